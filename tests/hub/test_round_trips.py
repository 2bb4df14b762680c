"""Models that are pushed to a Hub and loaded by their name, each in a fresh process with an empty cache."""

import json
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from tests.hub.clients.models import images
from tests.hub.clients.pipelines import pull_and_ask
from tests.hub.clients.repositories import (
    call,
    pull,
    pull_config,
    push,
    push_after_saving,
    push_subfolder,
    push_with_processor,
)
from tests.hub.processes import ClientError, client_environment


def weight_files(files):
    return {path for path in files if path.endswith((".safetensors", ".safetensors.index.json"))}


@pytest.fixture(scope="module", params=["timm", "vit", "bert"])
def whole(request, _clients, tmp_path_factory):
    """The name of a repository with a model and its processor, what was pushed, and the folder of that process."""
    name, folder = f"org/whole-{request.param}", tmp_path_factory.mktemp("whole")
    return name, _clients.run(push_with_processor, (name, request.param), {}, folder, "hf_alice"), folder


def test_a_pushed_model_comes_back_bit_for_bit(hub, run, whole, tmp_path):
    name, pushed, _ = whole
    assert len({str(output) for output in pushed["outputs"].values()}) == 3  # else any mask would do
    assert run(pull, name) == pushed
    pulled_to = [path for path in tmp_path.glob("*/cache/hub/*") if any(path.rglob("model.safetensors"))]
    assert pulled_to == [tmp_path / "process-1" / "cache" / "hub" / name.replace("org/", "models--org--")]
    push_commit, created = hub.repos[name].history()
    assert (push_commit.author, push_commit.parent) == ("alice", created.oid)


def test_nothing_that_is_pushed_can_be_executed_or_gives_away_who_pushed_it(hub, whole):
    name, _, folder = whole
    files = hub.repos[name].at("main").files
    assert {PurePosixPath(path).suffix or path for path in files} <= {
        *(".safetensors", ".json", ".md", ".png", ".gitattributes")
    }
    for path, file in files.items():
        assert b"hf_alice" not in file.data and str(folder).encode() not in file.data, path


def test_revisions_are_branches_tags_and_commits(hub, run):
    name = "org/revisions"
    first = run(push, name, seed=0)
    commit = hub.repos[name].at("main").oid
    run(call, "create_tag", name, tag="v1")
    on_branch = run(push, name, seed=1, revision="experiment")
    last = run(push, name, seed=2)
    expected = {"v1": first, commit: first, "experiment": on_branch, "main": last}
    assert len({model["mask_fingerprint"] for model in expected.values()}) == 3
    for revision, model in expected.items():
        assert run(pull, name, revision=revision) == model
    assert run(pull, name) == last
    assert hub.repos[name].at("experiment").parent == commit


def test_a_pull_request_can_be_loaded_before_it_is_merged(hub, run):
    name = "org/proposals"
    before = run(push, name, seed=0)
    proposed = run(push, name, seed=1, create_pr=True, user="bob")
    assert run(pull, name) == before
    assert run(pull, name, revision="refs/pr/1") == proposed
    run(call, "merge_pull_request", name, 1)
    assert run(pull, name) == proposed


def test_private_models_need_a_token(hub, run):
    name = "org/private"
    pushed = run(push, name, private=True)
    assert hub.repos[name].private
    assert run(pull, name, user="ann") == pushed
    for user in (None, "bob"):
        with pytest.raises(ClientError, match="OSError: org/private is not .*\n.*private.* pass a token"):
            run(pull, name, user=user)
    assert run(pull, name, user=None, token="hf_ann") == pushed


def test_a_model_in_a_subfolder(run):
    pushed = run(push_subfolder, "org/several", "models/small")
    for loader in ("RTLModel", "AutoModelForImageClassification"):
        assert run(pull, "org/several", loader, subfolder="models/small") == pushed


def test_sharded_weights_replace_whole_ones_and_the_other_way_round(hub, run):
    """Loading takes any `model.safetensors` that it finds, even an old one."""
    name = "org/shards"
    for seed, options in enumerate([{}, {"max_shard_size": "10KB"}, {"max_shard_size": "15KB"}, {}]):
        pushed = run(push, name, seed=seed, **options)
        files = hub.repos[name].at("main").files
        if options:
            index = json.loads(files["model.safetensors.index.json"].data)
            listed = set(index["weight_map"].values()) | {"model.safetensors.index.json"}
            assert len(listed) > 2
        else:
            listed = {"model.safetensors"}
        assert weight_files(files) == listed
        assert run(pull, name) == pushed


def test_saving_pushes_as_it_saves(hub, run):
    run(push_after_saving, "org/saved", private=True, commit_message="First", max_shard_size="10KB")
    repo = hub.repos["org/saved"]
    assert repo.private and repo.at("main").title == "First"
    assert len(weight_files(repo.at("main").files)) > 2 and "preprocessor_config.json" in repo.at("main").files


def test_every_class_that_can_load_it_gives_the_class_that_was_pushed(run):
    pushed = run(push, "org/classes")
    for loader in ("AutoModelForImageClassification", "AutoModel", "RTLModelForImageClassification"):
        assert run(pull, "org/classes", loader) == pushed
    kind, config = run(pull_config, "org/classes")
    assert kind == "RTLConfig" and config["mask_fingerprint"] == pushed["mask_fingerprint"]
    with pytest.raises(ClientError, match="ValueError: .*RTLModelForSemanticSegmentation has none"):
        run(pull, "org/classes", "RTLModelForSemanticSegmentation")


@pytest.mark.long
@pytest.mark.slow
def test_what_was_pulled_once_needs_no_hub(run, tmp_path):
    run(push_with_processor, "org/cached", "timm")
    images()[0].save(tmp_path / "image.png")
    program = """
        import sys
        from hf_rtl import RTLModel
        from transformers import pipeline

        print(RTLModel.from_pretrained("org/cached").mask_bank.fingerprint())
        print(pipeline("image-classification", model="org/cached")(sys.argv[1]))
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    fingerprint, answers = run(pull_and_ask, "org/cached", str(tmp_path / "image.png"))
    cache = tmp_path / "process-2" / "cache"
    variables = client_environment("http://127.0.0.1:1", cache=cache, HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", program, str(tmp_path / "image.png")]
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{fingerprint}\n{answers}\n"
