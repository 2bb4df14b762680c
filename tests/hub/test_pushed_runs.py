"""What a trainer pushes: the model that its run ended with, as one commit."""

import pytest

from tests.hub.clients.pipelines import ask
from tests.hub.clients.repositories import pull
from tests.hub.clients.runs import SHORT, push_untrained, retrain_then_push, train, train_then_push
from tests.hub.processes import ClientError


MODEL_FILES = {
    *("model.safetensors", "config.json", "preprocessor_config.json"),
    *("training_args.json", "training_run.json", "partition.json", "README.md", "similarity.png"),
}


@pytest.fixture
def check_final(hub, run, tmp_path):
    """
    `check_final(name, trained)` checks that the repository holds one commit, with the final model and nothing else.
    The run must be in the first process of the test.
    """

    def check(name, trained):
        pushed, _ = hub.repos[name].history()
        files = {path: file.data for path, file in pushed.files.items() if path != ".gitattributes"}
        assert files.keys() == MODEL_FILES
        folder = tmp_path / "process-1" / "run" / "final"
        assert files == {file.name: file.read_bytes() for file in folder.iterdir()}
        assert not any(str(tmp_path).encode() in data for data in files.values())
        assert run(pull, name) == trained

    return check


def test_a_trainer_pushes_its_final_model_with_the_processor(hub, run, check_final, tmp_path):
    trained = run(train_then_push, {"commit_message": "Done"}, hub_model_id="org/afterwards")
    check_final("org/afterwards", trained)
    assert hub.repos["org/afterwards"].at("main").title == "Done"
    for answer, scores in run(ask, "org/afterwards", "image-classification", backend="pil", timm=True):
        assert answer == pytest.approx(scores, rel=1e-5)
    folders = [file.parent for file in (tmp_path / "process-1" / "run").rglob("config.json")]
    assert len(folders) == 5  # two rounds, their checkpoints, the end
    assert all((folder / "preprocessor_config.json").exists() for folder in folders)


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_training_that_pushes_does_it_once_at_its_end(check_final, run, strategy):
    name = f"alice/{strategy}"
    trained = run(train, push_to_hub=True, hub_strategy=strategy, hub_model_id=strategy, **SHORT)
    check_final(name, trained)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_pushed(hub, run, strategy):
    with pytest.raises(ClientError, match=f"ValueError: `hub_strategy` = '{strategy}' .*pickle"):
        run(train, push_to_hub=True, hub_strategy=strategy, hub_model_id="org/checkpoints")
    assert "org/checkpoints" not in hub.repos


def test_a_push_follows_its_arguments(hub, run):
    run(train_then_push, {"private": True}, hub_model_id="org/told", **SHORT)
    assert hub.repos["org/told"].private
    run(train_then_push, {"token": "hf_ann"}, hub_model_id="org/told-token", hub_private_repo=True, **SHORT)
    assert hub.repos["org/told-token"].private and hub.repos["org/told-token"].at("main").author == "ann"
    there = {"hub_model_id": "org/told-branch", "hub_revision": "runs", "hub_token": "hf_ann"}
    run(train, push_to_hub=True, user=None, **there, **SHORT)
    repo = hub.repos["org/told-branch"]
    assert set(repo.at("runs").files) == MODEL_FILES | {".gitattributes"}
    assert set(repo.at("main").files) == {".gitattributes"}
    for path, file in repo.at("runs").files.items():
        assert b"hf_ann" not in file.data, path


def test_a_push_upon_another_state_is_refused_and_changes_nothing(hub, run):
    with pytest.raises(ClientError, match="A commit has happened since"):
        run(train_then_push, {"parent_commit": "0" * 40}, hub_model_id="org/stale-run", **SHORT)
    (created,) = hub.repos["org/stale-run"].history()
    assert set(created.files) == {".gitattributes"}


def test_a_control_is_not_pushed_in_place_of_the_run(run, check_final):
    check_final("org/control", run(retrain_then_push, hub_model_id="org/control", **SHORT))


def test_a_run_that_has_not_ended_has_nothing_to_push(hub, run):
    with pytest.raises(ClientError, match="ValueError: .*train()"):
        run(push_untrained, hub_model_id="org/untrained")
    assert "org/untrained" not in hub.repos
