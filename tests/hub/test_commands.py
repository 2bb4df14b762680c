"""`hf-rtl` with repositories."""

import json

import pytest

from tests.hub.clients.commands import command, save
from tests.hub.clients.models import TEXTS
from tests.hub.clients.pipelines import ask
from tests.hub.clients.repositories import pull, push, push_with_processor
from tests.hub.clients.runs import SHORT, train
from tests.hub.processes import ClientError
from tests.hub.server import ConnectionCut, File, HubError


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


def test_a_repository_answers_files_by_its_name(hub, run, tmp_path):
    run(push_with_processor, "org/asked", "bert", ticket_task="labels")
    (file := tmp_path / "text.txt").write_text(TEXTS[0])
    (value,) = json.loads(run(command, "predict", "org/asked", str(file), "--route", "bee", "--json"))
    _, scores = run(ask, "org/asked", "text-classification", route="bee")[0]
    assert value["answer"] == max(scores, key=scores.__getitem__)
    assert value["score"] == pytest.approx(max(scores.values()), rel=1e-5)
    run(push, "org/without-tokenizer", "bert", ticket_task="labels")
    remedy = r"AutoTokenizer\.from_pretrained\('org/backbone'\)\.push_to_hub\('org/without-tokenizer'\)"
    with pytest.raises(ClientError, match=f"'org/without-tokenizer' has no tokenizer.*{remedy}"):
        run(command, "predict", "org/without-tokenizer", str(file), "--route", "bee")


def test_errors_of_the_hub_are_one_line(hub, run, monkeypatch, tmp_path):
    run(push, "org/mine")
    # Weights that no other test has pushed, since the Hub does not ask for files that it has.
    run(save, str(tmp_path / "model"), seed=97, max_shard_size="10KB")
    before = dict(hub.repos["org/mine"].refs)
    for method, page, error, said in (
        ("PUT", "/", HubError(400, "the line was cut"), "Error while uploading .* the line was cut"),
        ("POST", "/api/repos/create", ConnectionCut(), "peer closed connection"),
    ):

        def before_request(given, path, method=method, page=page, error=error):
            if given == method and path.startswith(page):
                raise error

        monkeypatch.setattr(hub, "before_request", before_request)
        with pytest.raises(ClientError, match=f"RuntimeError: (.*\n)*hf-rtl push: error: .*{said}"):
            run(command, "push", str(tmp_path / "model"), "org/mine")
    assert hub.repos["org/mine"].refs == before
    monkeypatch.setattr(hub, "before_request", lambda method, path: None)
    for arguments in (("inspect", "org/nowhere"), ("inspect", "org/mine", "--revision", "nowhere")):
        with pytest.raises(ClientError, match="(?s)RuntimeError: hf-rtl inspect: error: .*nowhere"):
            run(command, *arguments)


@pytest.mark.parametrize("options", [[], ["--compact"]])
def test_what_somebody_wrote_on_the_hub_stays(hub, run, tmp_path, options):
    name, folder = f"org/written{len(options)}", str(tmp_path / "model")
    run(save, folder)
    run(command, "card", folder)
    run(command, "push", folder, name, *options)
    repo = hub.repos[name]
    page = repo.at("main").files["README.md"].data
    repo.commit("refs/heads/main", {**repo.at("main").files, "README.md": File(page + b"\nMine.\n")}, "Write", "ann")
    local = tmp_path / "model" / "README.md"
    before = local.read_bytes()
    run(command, "push", folder, name, *options)
    page = repo.at("main").files["README.md"].data
    assert page.endswith(b"\nMine.\n") and local.read_bytes() == page
    # Text that is added to the local card is pushed.
    local.write_bytes(page + b"\nAlso mine.\n")
    run(command, "push", folder, name, *options)
    assert repo.at("main").files["README.md"].data.endswith(b"\nMine.\n\nAlso mine.\n")
    # A local card from before the edits does not replace them.
    local.write_bytes(before + b"\nOnly here.\n")
    with pytest.raises(ClientError, match=f"error: both '{folder}/README.md' and .* were changed by hand"):
        run(command, "push", folder, name, *options)
    assert repo.at("main").files["README.md"].data.endswith(b"\nMine.\n\nAlso mine.\n")


@pytest.mark.parametrize("options", [[], ["--compact"]])
def test_a_models_code_is_pushed_with_it(hub, run, tmp_path, options):
    name, folder = f"org/with-code{len(options)}", str(tmp_path / "model")
    saved = run(save, folder, with_code=True)
    run(command, "push", folder, name, *options)
    files = hub.repos[name].at("main").files
    code = {file.name for file in (tmp_path / "model").glob("*.py")}
    assert json.loads(files["config.json"].data)["auto_map"] and code and code <= set(files)
    assert run(pull, name)["outputs"] == saved["outputs"]


def test_the_page_keeps_what_is_known_of_the_run(hub, run, tmp_path):
    run(train, **SHORT)
    folder = next(tmp_path.glob("process-*/run/final"))
    run(command, "push", str(folder), "org/of-a-run")
    pushed = hub.repos["org/of-a-run"].at("main").files
    assert "training_run.json" in pushed
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("| ") and "path/to" not in line:
            assert line in pushed["README.md"].data.decode(), line


def test_the_card_of_a_repository_goes_on_from_its_own(hub, run, tmp_path):
    run(train, **SHORT)
    folder = next(tmp_path.glob("process-*/run/final"))
    run(command, "push", str(folder), "org/carded")
    repo = hub.repos["org/carded"]
    page = repo.at("main").files["README.md"].data + b"\nMine.\n"
    repo.commit("refs/heads/main", {**repo.at("main").files, "README.md": File(page)}, "Write", "ann")
    assert run(command, "card", "org/carded").encode().rstrip() == page.rstrip()  # nothing new to write
    run(command, "card", "org/carded", "--out", str(tmp_path / "page"))
    assert (tmp_path / "page" / "README.md").read_bytes() == page


def test_a_compact_repository_with_code_stays_so_when_tickets_are_dropped(hub, run, tmp_path):
    run(save, str(tmp_path / "model"), with_code=True, compact=True)
    run(command, "push", str(tmp_path / "model"), "org/compact-code")
    assert json.loads(hub.repos["org/compact-code"].at("main").files["config.json"].data)["compact"] is not None
    run(command, "tickets", "drop", "org/compact-code", "--route", "bee", "--out", str(tmp_path / "fewer"))
    config = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert config["auto_map"] and config["compact"] is not None and config["route_names"] == ["ant", "cat"]
    assert {file.name for file in (tmp_path / "fewer").glob("*.py")} >= {"modeling_rtl.py", "configuration_rtl.py"}
