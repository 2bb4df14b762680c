"""`hf-rtl` with repositories."""

import json

import pytest
from hub.clients import command, pull, push, save
from hub.processes import ClientError


def test_a_folder_is_pushed_and_looked_at_by_its_name(hub, run, tmp_path):
    saved = run(save, str(tmp_path / "model"))
    (tmp_path / "model" / "notes.pickle").write_bytes(b"no part of a model")
    pushed = run(command, "push", str(tmp_path / "model"), "org/by-command", "--private", "--json")
    repo = hub.repos["org/by-command"]
    head, created = repo.history()
    assert head.parent == created.oid and repo.private and json.loads(pushed)["commit"] == head.oid
    assert set(head.files) == {".gitattributes", "config.json", "model.safetensors"}
    assert run(pull, "org/by-command") == saved
    values = json.loads(run(command, "inspect", "org/by-command", "--json"))
    assert [route["name"] for route in values["routes"]] == saved["route_names"]
    page = run(command, "card", "org/by-command")
    assert page.startswith("---\n") and "org/by-command" in page
    run(command, "push", str(tmp_path / "model"), "org/by-command", "--compact", "--revision", "small")
    assert len(repo.at("small").files["model.safetensors"].data) < len(head.files["model.safetensors"].data)
    assert run(pull, "org/by-command", revision="small")["outputs"] == saved["outputs"]


def test_errors_of_the_hub_are_one_line(run):
    run(push, "org/mine")
    for arguments in (("inspect", "org/nowhere"), ("inspect", "org/mine", "--revision", "nowhere")):
        with pytest.raises(ClientError, match="(?s)RuntimeError: hf-rtl inspect: error: .*nowhere"):
            run(command, *arguments)
