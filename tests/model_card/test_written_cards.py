"""Model cards: their code, their arguments, the text of users that they keep, and when they are written."""

from __future__ import annotations

import builtins
import getpass
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTImageProcessor

import hf_rtl.model_card.card
import hf_rtl.plots
from hf_rtl import ByColumn, RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments, save_rule
from hf_rtl.model_card import RTLCardData, write_card
from tests.child_processes import ROOT
from tests.model_card.cards import faults, make_model, python_blocks, read_page, table_with
from tests.pictures import draw_similarity


# How to use it


@pytest.mark.slow
@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
def test_the_code_on_the_page_runs(tmp_path, monkeypatch, ticket_task):
    model = make_model(ticket_task, route_names=['the "best" cat', "dog"])
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("org/name")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("org/name")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save("image.png")
    inputs = processor(image, return_tensors="pt")
    blocks = python_blocks(read_page(write_card("org/name", model_id="org/name")))
    assert len(blocks) == 3
    names = {"inputs": inputs}
    for block in blocks:
        exec(block, names)
    expected = model(**inputs, route_ids=0).logits
    assert torch.equal(names["outputs"].logits, expected)
    assert type(names["ticket"]).__name__ == "TimmWrapperForImageClassification"
    assert torch.equal(names["ticket"](**inputs).logits, expected)
    answers = names["classifier"]("image.png", top_k=None, route_ids=0)
    if ticket_task == "membership":
        scores = {model.route_names[0]: expected.sigmoid().item()}
    else:
        scores = dict(zip(model.config.id2label.values(), expected.softmax(1)[0].tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, rel=1e-4)


@pytest.mark.slow
def test_code_that_is_saved_along_is_named(tmp_path):
    model = make_model()
    for with_code in (False, True):
        model.save_pretrained(tmp_path, with_code=with_code)
        blocks = python_blocks(read_page(write_card(model, tmp_path, model_id="org/name")))
        trusting = 'AutoModelForImageClassification.from_pretrained("org/name", trust_remote_code=True).eval()'
        assert [trusting in block for block in blocks] == [False, False, *[True] * with_code, False]
        # The same holds for a card in another folder.
        elsewhere = write_card(tmp_path, tmp_path / f"page-{with_code}", model_id="org/name").read_text()
        assert (trusting in elsewhere) == with_code


# Arguments


@pytest.mark.slow
def test_a_rule_beside_the_model_is_named(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert "load_rule" not in read_page(write_card(tmp_path))
    save_rule(tmp_path, ByColumn("a_b*", model.route_names))
    for source, folder in ((tmp_path, None), (model, tmp_path)):
        page = read_page(write_card(source, folder, model_id="org/name"))
        says = r"what its column 'a\_b\*' says: " + '`hf_rtl.load_rule("org/name").assign(data)`.'
        assert f"\nThe route of a sample in other data is {says}\n" in page
    save_rule(tmp_path, ByColumn("label", ["dog", "cat", "owl"]))
    assert "load_rule" not in read_page(write_card(tmp_path))


@pytest.mark.slow
def test_given_card_data_are_shown_and_kept(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    given = {
        "model_id": "org/animals",
        "description": "For *zoos*.",
        "authors": ["Ada <ada@x.org>", "Bo"],
        "citation": "@misc{animals}",
        "base_model": "timm/resnet18.a1_in1k",
        "language": "en",
        "license": "other",
        "license_name": "zoo",
        "license_link": "LICENSE",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["animals"],
        "datasets": ["org/zoo"],
    }
    file = write_card(tmp_path, **given)
    content = file.read_bytes()
    card = ModelCard(content.decode())
    assert "# animals\n" in card.text and "For *zoos*." in card.text and "By Ada \\<ada@x.org\\>, Bo." in card.text
    assert "```bibtex\n@misc{animals}\n```" in card.text and 'from_pretrained("org/animals")' in card.text
    for name in ("base_model", "language", "license", "license_name", "license_link", "pipeline_tag", "datasets"):
        assert card.data.get(name) == given[name], name
    assert "animals" in card.data.tags
    assert write_card(tmp_path).read_bytes() == content
    assert "# Animals of zoos\n" in write_card(tmp_path, model_name="Animals of zoos").read_text()


def test_a_model_with_a_folder_is_enough(tmp_path):
    model = make_model()
    model.add_model_tags(["mine"])
    file = write_card(model, tmp_path / "new", license="mit")
    assert file == tmp_path / "new" / "README.md" and "mine" in ModelCard.load(file).data.tags
    assert {path.name for path in file.parent.iterdir()} == {"README.md", "similarity.png"}


@pytest.mark.slow
def test_the_picture_is_of_the_models_tickets(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_rtl.plots, "similarity_heatmap", draw_similarity)
    model = make_model()
    write_card(model, tmp_path)
    bank = model.mask_bank
    draw_similarity(bank.similarity(), bank.route_names, tmp_path / "expected", chance=bank.chance_similarity())
    assert (tmp_path / "similarity.png").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"licence": "mit"}, TypeError, "`licence` is no field of a card; did you mean `license`"),
        ({"license": 3}, TypeError, "`license` must be a string, got 3"),
        ({"tags": ["a", 3]}, TypeError, r"`tags` must be a string or a list of strings, got \['a', 3\]"),
        ({"tags": ("a", "b")}, TypeError, r"`tags` must be a string or a list of strings, got \('a', 'b'\)"),
        ({"license": ["mit"]}, TypeError, r"`license` must be a string, got \['mit'\]"),
    ],
)
def test_what_no_card_can_say_is_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_card(make_model(), tmp_path / "new", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_model_or_folder_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`source` must be a model, or a folder with one that `save_pretrained` wrote"
    ):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="`folder` is missing"):
        write_card(make_model())
    assert not list(tmp_path.iterdir())


def test_a_card_that_cannot_be_read_is_refused_and_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nMine\n")
    with pytest.raises(ValueError, match="README.md.* is no YAML"):
        write_card(make_model(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "---\nlicense: [\n---\nMine\n"


# What a user wrote


@pytest.mark.slow
def test_what_a_user_wrote_survives(tmp_path, caplog):
    file = tmp_path / "README.md"
    mine = "---\nlicense: apache-2.0  # as agreed\ntags: [zoo]\nextra: 1\n---\n# Mine\n\nText.\n"
    file.write_text(mine)
    model = make_model()
    write_card(model, tmp_path, license="mit", datasets="org/zoo")
    assert "`license` = 'mit' is not written" in caplog.text and "'apache-2.0'" in caplog.text
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0" and card.data.extra == 1
    assert card.data.tags == ["zoo", "hf_rtl", "pruning", "sparsity", "lottery-ticket"]
    assert "license: apache-2.0  # as agreed\n" in file.read_text()
    assert card.text.startswith("# Mine\n\nText.\n\n<!-- hf_rtl: begin") and card.text.count("\n# ") == 0
    content = file.read_bytes()
    write_card(model, tmp_path)
    assert file.read_bytes() == content
    file.write_bytes(content + b"\nMore.\n")
    model.mask_bank["cat"] = model.mask_bank["dog"]
    write_card(model, tmp_path)
    changed = file.read_bytes()
    assert changed != content + b"\nMore.\n" and changed.endswith(b"\nMore.\n")
    assert changed.startswith(content.partition(b"<!-- hf_rtl")[0])


def test_a_license_given_again_replaces_the_one_given_before(tmp_path, caplog):
    model = make_model()
    for license in ("mit", "bsd-3-clause"):
        assert ModelCard.load(write_card(model, tmp_path, license=license)).data.license == license
    assert not caplog.text


LOCAL, REMOTE = b"Written here.\n", b"---\nlicense: mit\n---\nWritten there.\n"


@pytest.mark.slow
def test_a_push_keeps_the_text_that_was_written_by_hand(tmp_path):
    model, file = make_model(), tmp_path / "README.md"

    def push(remote):
        return write_card(model, tmp_path, remote=remote).read_bytes()

    # Only the remote card was edited, by a user without hf_rtl.
    write_card(model, tmp_path)
    pushed = push(REMOTE)
    assert b"Written there." in pushed and b"license: mit" in pushed
    # The remote card was edited after the push. The local one was written again, but not edited.
    write_card(model, tmp_path)
    edited = pushed.replace(b"there.", b"there, later.")
    pushed = push(edited)
    assert b"Written there, later." in pushed
    # Only the local card was edited.
    file.write_bytes(pushed.replace(b"there, later.", b"here.") + LOCAL)
    pushed = push(pushed)
    assert b"Written here.\n" in pushed and b"there" not in pushed
    # Both cards were edited: nothing is lost, and nothing is written.
    file.write_bytes(pushed + b"Here.\n")
    with pytest.raises(ValueError, match="were changed by hand"):
        push(pushed + b"There.\n")
    assert file.read_bytes() == pushed + b"Here.\n"
    # Both cards have the same edit.
    assert push(file.read_bytes()).endswith(b"Here.\n")


@pytest.mark.slow
def test_what_was_written_here_is_not_lost_to_a_card_of_the_hub(tmp_path):
    """Writing the local card in between is no push, and loses no text either."""
    (tmp_path / "README.md").write_bytes(LOCAL)
    model = make_model()
    write_card(model, tmp_path)
    with pytest.raises(ValueError, match="were changed by hand"):
        write_card(model, tmp_path, remote=REMOTE)
    assert (tmp_path / "README.md").read_bytes().startswith(b"---\n")
    fresh = write_card(make_model(), tmp_path / "fresh", remote=b"").read_bytes()
    assert LOCAL in write_card(model, tmp_path, remote=fresh).read_bytes()


# Files beside the card


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    def importing(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **keywords)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(hf_rtl.model_card.card, "find_spec", lambda name: None)
    page = read_page(write_card(make_model(), tmp_path))
    assert "similarity.png" not in page and len(table_with(page, "cat", "dog", "owl")) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_one_route_has_no_pairs(tmp_path):
    model = make_model("labels", route_names=["only"])
    page = read_page(write_card(model, tmp_path))
    assert "Jaccard" not in page and "nan" not in page


def test_the_template_is_a_part_of_the_package():
    pyproject = ROOT / "pyproject.toml"
    assert '"hf_rtl.model_card" = ["template.md"]' in pyproject.read_text()
    assert (Path(hf_rtl.__file__).parent / "model_card" / "template.md").is_file()


# After a training


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Two rounds, evaluated on two sets."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(30, 3, 32, 32, generator=generator)
    samples = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]
    args = RTLTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("secret-folder") / "run"),
        target_sparsity=[0.2, 0.4],
        rewind_to_current=True,  # the model has masks
        prune_amount=0.3,
        extraction_steps=1,
        max_steps=2,
        route_batch_size=8,
        calibration_fraction=0.3,
        save_strategy="no",
        run_name="secret-name",
        hub_token="hf_secret",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    evaluated = {"near": samples[:12], "near_by": samples[12:18]}
    names = ["cat", "dog", "owl"]
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=names, ticket_task="membership", seed=0
    )
    trainer = RTLTrainer(model, args, train_dataset=samples, eval_dataset=evaluated)
    trainer.card_data = RTLCardData(dataset_name="Noise")
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_training_ends_with_a_card(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    assert {"README.md", "similarity.png", "training_run.json"} <= {file.name for file in folder.iterdir()}
    card = ModelCard.load(folder / "README.md")
    assert faults(card.data.to_dict()) == []
    assert {result.dataset_name for result in card.data.eval_results} == {"Noise"}
    measured = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(measured) == len(card.data.eval_results) == 2 * 7
    for name in ("near", "near_by"):
        expected = trainer.rounds[-1]["metrics"][f"eval_{name}_calibrated_balanced_accuracy"]
        words = "Balanced accuracy, calibrated threshold, mean over routes"
        assert measured[f"{name}, all routes", words] == expected
    assert [(row["sparsity"], row["bal. acc. (near_by)"]) for row in table_with(card.text, "round")] == [
        (f"{100 * report['sparsity']:.1f} %", f"{report['metrics']['eval_near_by_balanced_accuracy']:.3f}")
        for report in trainer.rounds
    ]
    assert [row["by chance"] for row in table_with(card.text.partition("### On near\\_by")[2], "by chance")] == [
        "0.500"
    ] * 4
    assert "### On near\n" in card.text and "### On near\\_by\n" in card.text
    counts = [row["training samples"] for row in table_with(card.text, "kept weights")]
    assert counts == [*map(str, trainer.run_data.training.partition.counts.tolist()), "21"]
    assert f"torch {torch.__version__}" in card.text and "1 process (cpu)" in card.text
    assert "all of them are in\n[training_args.json](training_args.json):" in card.text


@pytest.mark.slow
def test_a_card_shows_nothing_private(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    secrets = [str(folder.parent), "secret", "hf_secret", socket.gethostname(), f"/{getpass.getuser()}/"]
    for name in ("README.md", "training_run.json"):
        text = (folder / name).read_text()
        assert [secret for secret in secrets if secret in text] == [], name


@pytest.mark.slow
def test_a_trainer_takes_trainer_s_names_and_ours(trainer):
    folder = Path(trainer.args.output_dir) / "final"
    trainer.create_model_card(
        license="mit",
        finetuned_from="org/base",
        tasks="image-feature-extraction",
        dataset_tags=["org/noise"],
        dataset="Noise of ours",
        authors=["Ada"],
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "org/base", ["org/noise"])
    assert card.data.pipeline_tag == "image-feature-extraction" and {
        r.dataset_name for r in card.data.eval_results
    } == {"Noise of ours"}
    assert "By Ada." in card.text
    with pytest.raises(TypeError, match="`autors` is no field of a card; did you mean `authors`"):
        trainer.create_model_card(autors=["Ada"])


@pytest.mark.slow
def test_the_model_of_a_trainer_knows_its_run_until_it_changes(trainer, tmp_path):
    page = write_card(trainer.model, tmp_path).read_text()
    assert "model-index" in page and "training_args.json" not in page  # a missing file must not be linked
    before = trainer.model.mask_bank["cat"]
    trainer.model.mask_bank["cat"] = trainer.model.mask_bank["dog"]
    assert "model-index" not in write_card(trainer.model, tmp_path).read_text()
    # The card of the run does not change with the model.
    file = Path(trainer.args.output_dir) / "final" / "README.md"
    content = file.read_bytes()
    trainer.create_model_card()
    assert file.read_bytes() == content
    trainer.model.mask_bank["cat"] = before


def test_a_trainer_that_has_not_trained_has_no_card(tmp_path):
    args = RTLTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"has no final model yet; run `train\(\)` to its end first"):
        RTLTrainer(make_model(), args).create_model_card(license="mit")
