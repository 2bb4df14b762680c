"""Models with their code: it runs only for users who trust it, and these need no hf_rtl."""

import json
from pathlib import Path

import pytest

from tests.hub.clients.pipelines import ask_one, ask_to_generate
from tests.hub.clients.repositories import pull, pull_executed, push, push_own_backbone, push_with_processor
from tests.hub.processes import ClientError
from tests.hub.server import File


STRANGER = Path(__file__).parent / "stranger.py"


def have_code_leave(marker, repo):
    """Commits a change to all code of a repository: when it is run, it makes the file `marker`."""
    files = dict(repo.at("main").files)
    future = b"from __future__ import annotations\n"  # This line must stay first.
    for path in files:
        if path.endswith(".py"):
            before, after = files[path].data.split(future, 1)
            leaving = f"import pathlib\n\npathlib.Path({str(marker)!r}).touch()\n".encode()
            files[path] = File(before + future + leaving + after)
    repo.commit("refs/heads/main", files, "Change the code", "alice")


@pytest.mark.long
@pytest.mark.slow
def test_a_user_who_trusts_the_code_needs_no_hf_rtl(hub, run, bare_environment, tmp_path):
    marker = tmp_path / "executed"
    pushed = {}
    cases = {
        "timm": {},
        "vit": {"max_shard_size": "10KB"},
        "gpt2": {"ticket_task": "labels"},
        "bert": {"max_shard_size": "10KB", "compact": True},
    }
    for kind, options in cases.items():
        name = f"org/code-{kind}"
        pushed[name] = run(push_with_processor, name, kind, with_code=True, **options)
    have_code_leave(marker, hub.repos["org/code-timm"])

    folder = tmp_path / "stranger"
    printed = bare_environment.run(STRANGER, marker, *pushed, url=hub.url, folder=folder, HF_TOKEN="hf_alice")
    said = json.loads(printed.splitlines()[-1])
    assert len(said["doubting"]) == 6 and all("`trust_remote_code=True`" in error for error in said["doubting"])
    assert (said["marked_by_doubting"], said["marked_by_trusting"]) == (False, True)
    assert said["trusting"].keys() == pushed.keys()
    for name, loaded in said["trusting"].items():
        expected = {key: value for key, value in pushed[name].items() if key != "tensors"}
        assert loaded["config"] == "RTLConfig"
        assert loaded["module"].startswith("transformers_modules.org.")
        assert loaded["task_class"] == loaded["base_class"] == loaded["saved_again"] == expected
        if "gpt2" in name:
            assert loaded["answers"] == [{"generated_text": run(ask_to_generate, name, route_ids="bee")}]
        else:
            task = "text-classification" if "bert" in name else "image-classification"
            scores = {answer["label"]: answer["score"] for answer in loaded["answers"]}
            assert scores == run(ask_one, name, task)
    # A model that was saved without hf_rtl loads like any other.
    assert run(pull, str(folder / "org-code-vit")) == pushed["org/code-vit"]
    # A model that was pushed in the compact form has all weights of its tickets.
    by_stranger, whole = run(pull, "org/by-a-stranger"), pushed["org/code-bert"]
    assert {**by_stranger, "tensors": None} == {**whole, "tensors": None}
    card = hub.repos["org/by-a-stranger"].at("main").files["README.md"].data
    assert b"- mine" in card and b"hf_rtl:" not in card  # The code that is pushed does not write cards.


def test_with_hf_rtl_no_code_of_a_repository_is_run(hub, run, tmp_path):
    pushed = run(push_with_processor, "org/marked", "vit", with_code=True)
    have_code_leave(tmp_path / "executed", hub.repos["org/marked"])
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        loaded, executed = run(pull_executed, "org/marked", str(tmp_path / "executed"), **options)
        assert loaded == [pushed] * 4 and not executed


def test_code_that_is_not_ours_is_refused_where_ours_is(hub, run, tmp_path):
    name = "org/foreign-code"
    run(push, name)
    marker = tmp_path / "executed"
    repo = hub.repos[name]
    files = dict(repo.at("main").files)
    config = json.loads(files["config.json"].data)
    config["auto_map"] = {"AutoConfig": "evil.RTLConfig", "AutoModel": "evil.RTLModel"}
    files["config.json"] = File(json.dumps(config).encode())
    files["evil.py"] = File(f"open({str(marker)!r}, 'w')\n".encode())
    repo.commit("refs/heads/main", files, "Be evil", "alice")
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ClientError, match="ValueError: `config.auto_map` = .*evil.* is not allowed"):
            run(pull_executed, name, str(marker), **options)
    assert not marker.exists()


def test_code_is_pushed_when_it_is_asked_for_only(hub, run):
    name = "org/sometimes-code"
    run(push, name, with_code=True)
    files = hub.repos[name].at("main").files
    assert {path for path in files if path.endswith(".py")} >= {"modeling_rtl.py", "configuration_rtl.py"}
    assert json.loads(files["config.json"].data)["auto_map"] == {
        "AutoConfig": "configuration_rtl.RTLConfig",
        "AutoModel": "modeling_rtl.RTLModelForImageClassification",
        "AutoModelForImageClassification": "modeling_rtl.RTLModelForImageClassification",
    }
    run(push, name)
    assert "auto_map" not in json.loads(hub.repos[name].at("main").files["config.json"].data)


def test_a_backbone_of_ours_needs_the_package_and_says_so(hub, run):
    said = run(push_own_backbone, "org/own-backbone")
    files = hub.repos["org/own-backbone"].at("main").files
    assert not any(path.endswith(".py") for path in files)
    assert "auto_map" not in json.loads(files["config.json"].data)
    assert len(said) == 1 and "its backbone is of hf_rtl" in said[0] and "`import hf_rtl` first" in said[0]
    run(pull, "org/own-backbone")
