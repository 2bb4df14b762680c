"""The card of a pushed model: what hf_rtl writes on it, and which text of others stays."""

import pytest

from tests.hub.clients.cards import (
    create_with_card,
    edit_card,
    push_again_after_a_refused_push,
    push_again_after_an_edit_here,
    push_again_after_an_edit_there,
    push_again_after_edits_on_both_sides,
    push_trained_model,
    read_and_validate,
    train_from_hub,
)
from tests.hub.clients.repositories import copy_repo, push


def card_at(hub, name, revision="main"):
    return hub.repos[name].at(revision).files["README.md"].data.decode()


@pytest.mark.parametrize("kind, task", [("vit", "image-classification"), ("bert", "text-classification")])
def test_a_pushed_model_has_a_card_of_its_own(hub, run, kind, task):
    name = f"org/card-{kind}"
    run(push, name, kind, tags=["mine"])
    card = run(read_and_validate, name)
    assert card["pipeline_tag"] == task and {"hf_rtl", "mine"} <= set(card["tags"])
    assert f'from_pretrained("{name}")' in card["text"] and f"# card-{kind}\n" in card["text"]
    assert "](similarity.png)" in card["text"]
    assert hub.repos[name].at("main").files["similarity.png"].data.startswith(b"\x89PNG")
    before = card_at(hub, name)
    run(push, name, kind)
    assert card_at(hub, name) == before


def test_the_model_of_a_trainer_is_pushed_with_what_its_run_says(hub, run, tmp_path):
    run(push_trained_model, "org/card-trained")
    card = run(read_and_validate, "org/card-trained")
    assert "2 rounds: in each" in card["text"] and "the run evaluated nothing" in card["text"]
    assert "training_args.json" not in card["text"]  # a missing file must not be linked
    page = card_at(hub, "org/card-trained")
    # A copy of the model that is pushed, there or elsewhere, keeps what is known of the run; a changed model loses it.
    run(copy_repo, "org/card-trained", "org/card-trained")
    assert card_at(hub, "org/card-trained") == page
    run(copy_repo, str(tmp_path / "process-1" / "run" / "final"), "org/card-copied")
    copy = card_at(hub, "org/card-copied")
    assert "2 rounds: in each" in copy and "all of them are in\n[training_args.json](training_args.json):" in copy
    assert {"training_run.json", "training_args.json"} <= hub.repos["org/card-copied"].at("main").files.keys()
    run(copy_repo, "org/card-trained", "org/card-fewer", drop="bee")
    assert "How the tickets were found and trained is not known" in card_at(hub, "org/card-fewer")
    assert "training_run.json" not in hub.repos["org/card-fewer"].at("main").files


def test_text_of_the_hub_stays(hub, run):
    name = "org/card-edited"
    run(create_with_card, name, "---\nlicense: mit # yes\n---\n# Mine\n")
    run(push, name, seed=0)
    card = card_at(hub, name)
    assert card.startswith("---\nlicense: mit # yes\n") and "\n---\n# Mine\n\n<!-- hf_rtl: begin" in card
    run(edit_card, name, "# Mine\n", "# Mine alone\n")
    run(push, name, seed=1, revision="experiment")
    run(edit_card, name, "hf_rtl: end -->", "hf_rtl: end -->\n\nOn the branch.", revision="experiment")
    run(push, name, seed=2, revision="experiment")
    assert "# Mine alone\n" in card_at(hub, name, "experiment") and "On the branch." in card_at(
        hub, name, "experiment"
    )
    run(push, name, seed=3)
    assert "# Mine alone\n" in card_at(hub, name) and "On the branch." not in card_at(hub, name)
    run(push, name, seed=4, create_pr=True, user="bob")
    assert "# Mine alone\n" in card_at(hub, name, "refs/pr/1")


def test_a_run_is_pushed_again_upon_an_edit_there(hub, run):
    run(push_again_after_an_edit_there, "org/card-there")
    card = run(read_and_validate, "org/card-there")
    assert card["license"] == "apache-2.0" and "hf_rtl: end -->\nTwo.\n" in card["text"] and "One." not in card["text"]
    assert hub.repos["org/card-there"].at("main").title == "Last"


def test_a_run_is_pushed_again_with_an_edit_here(hub, run):
    run(push_again_after_an_edit_here, "org/card-here")
    assert card_at(hub, "org/card-here").endswith("One.\nTwo.\n")


def test_edits_on_both_sides_are_an_error_and_not_a_loss(hub, run):
    name = "org/card-both"
    error, is_kept = run(push_again_after_edits_on_both_sides, name)
    assert "were changed by hand" in error and is_kept
    assert "license: apache-2.0" in card_at(hub, name) and len(hub.repos[name].history()) == 3


def test_an_edit_whose_push_failed_is_pushed_by_the_next(hub, run):
    run(push_again_after_a_refused_push, "org/card-again")
    assert card_at(hub, "org/card-again").endswith("Mine.\n")


def test_the_base_is_named_if_it_is_a_repository(hub, run):
    run(train_from_hub, "org/plain", "org/card-based")
    card = run(read_and_validate, "org/card-based-repo")
    assert card["base_model"] == "org/plain"
    assert "started from those of [org/plain](https://huggingface.co/org/plain)" in card["text"]
    for name in ("org/card-based-folder", "org/card-based-both"):
        assert "base_model" not in run(read_and_validate, name)
    for path, file in hub.repos["org/card-based-folder"].at("main").files.items():
        assert b"secret" not in file.data, path
