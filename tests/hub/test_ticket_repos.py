"""Tickets in repositories of their own: one user pushes them, another adds them to a copy of the same base."""

import json

import pytest

from tests.hub.clients.repositories import base_fingerprint, copy_repo, pull, push
from tests.hub.clients.tickets import pull_with_tickets, push_compact, push_model_and_tickets, push_tickets
from tests.hub.processes import ClientError
from tests.hub.server import File, HubError


@pytest.fixture(scope="module")
def base(hub, _clients, tmp_path_factory):
    """A model on the Hub, `org/ticket-base`."""
    name = "org/ticket-base"
    _clients.run(push, (name, "vit"), {}, tmp_path_factory.mktemp("base"), "hf_alice")
    return name


@pytest.fixture(scope="module")
def base_with_statistics(hub, _clients, tmp_path_factory):
    """A model with batch norm on the Hub, `org/ticket-base-with-statistics`."""
    name = "org/ticket-base-with-statistics"
    _clients.run(push, (name, "timm"), {}, tmp_path_factory.mktemp("base"), "hf_alice")
    return name


@pytest.mark.long
def test_a_strangers_ticket_in_three_lines(hub, run, base_with_statistics, tmp_path):
    base = base_with_statistics
    author = run(push_tickets, base, "bob/moths", routes=["moth"], added="moth", user="bob")
    user = run(pull_with_tickets, base, "bob/moths", user="ann")
    assert user["route_names"] == ["ant", "bee", "cat", "moth"]
    assert user["outputs"] == author["outputs"] and user["tensors"] == author["tensors"]
    files = hub.repos["bob/moths"].at("main").files
    assert set(files) == {".gitattributes", "README.md", "tickets.json", "ticket-000.safetensors"}
    index = json.loads(files["tickets.json"].data)
    assert (index["base"]["repo"], index["base"]["revision"]) == (base, hub.repos[base].at("main").oid)
    assert index["base"]["fingerprint"] == run(base_fingerprint, base)["fingerprint"]
    commit, created = hub.repos["bob/moths"].history()
    assert (commit.title, commit.author, commit.parent) == ("Upload tickets", "bob", created.oid)
    for path, file in files.items():
        assert b"hf_bob" not in file.data and str(tmp_path).encode() not in file.data, path
    page = files["README.md"].data.decode()
    assert f"base_model: {base}" in page and "load_tickets('bob/moths')" in page and "| moth |" in page
    assert "from_backbone(stock_model, tickets='bob/moths')" in page


def test_only_the_tickets_that_are_asked_for_are_downloaded(run, base_with_statistics, tmp_path):
    base = base_with_statistics
    run(push_tickets, base, "org/tickets")
    whole = run(pull, base)
    user = run(pull_with_tickets, base, "org/tickets", ["bee"], drop="bee")
    assert user["route_names"] == ["ant", "cat", "bee"] and user["outputs"] == whole["outputs"]
    downloaded = {path.name for path in (tmp_path / "process-3" / "cache").rglob("models--org--tickets/**/ticket*")}
    assert downloaded == {"tickets.json", "ticket-001.safetensors"}


def test_all_files_are_of_the_commit_of_the_index(hub, run, base, monkeypatch):
    """Somebody pushes between two downloads."""
    run(push_tickets, base, "org/moving")
    repo, whole = hub.repos["org/moving"], run(pull, base)

    def interfere(method, path):
        if method == "HEAD" and path.endswith("ticket-000.safetensors"):
            hub.before_request = lambda method, path: None
            files = {**repo.at("main").files, "ticket-000.safetensors": File(b"other", large=True)}
            repo.commit("refs/heads/main", files, "Change", "ann")

    monkeypatch.setattr(hub, "before_request", interfere)
    user = run(pull_with_tickets, base, "org/moving", ["ant"], drop="ant")
    assert repo.at("main").title == "Change" and user["outputs"] == whole["outputs"]


def write_page(repo, content):
    repo.commit("refs/heads/main", {**repo.at("main").files, "README.md": File(content)}, "Write", "ann")


def test_a_later_push_leaves_no_ticket_of_an_earlier_one_and_keeps_what_is_written_on_the_page(hub, run, base):
    name = "org/fewer"
    run(push_tickets, base, name)
    repo = hub.repos[name]
    page = repo.at("main").files["README.md"].data
    assert b"| ant |" in page and b"| cat |" in page
    write_page(repo, page + b"\nMine.\n")
    run(push_tickets, base, name, routes=["cat"], commit_message="One will do", parent_commit=repo.at("main").oid)
    files = repo.at("main").files
    page = files["README.md"].data
    assert repo.at("main").title == "One will do" and page.endswith(b"hf_rtl: end -->\n\nMine.\n")
    assert b"| ant |" not in page and b"| cat |" in page
    assert {path for path in files if path.startswith("ticket")} == {"tickets.json", "ticket-000.safetensors"}
    assert [ticket["name"] for ticket in json.loads(files["tickets.json"].data)["tickets"]] == ["cat"]

    # As with models, a card without a generated part gets one, and keeps all its text.
    write_page(repo, b"# Mine\n")
    run(push_tickets, base, name, routes=["ant"])
    page = repo.at("main").files["README.md"].data
    assert b"\n---\n# Mine\n\n<!-- hf_rtl: begin" in page and b"| ant |" in page and b"| cat |" not in page


def test_the_page_of_a_model_stays_when_tickets_are_pushed_beside_it(hub, run):
    run(push_model_and_tickets, "org/both", "org/both")
    files = hub.repos["org/both"].at("main").files
    assert {"model.safetensors", "tickets.json"} <= files.keys()
    assert files["README.md"].data == hub.repos["org/both"].history()[1].files["README.md"].data


def test_private_tickets_branches_and_pull_requests(hub, run, base):
    run(push_tickets, base, "org/secret", private=True)
    assert hub.repos["org/secret"].private
    for user in (None, "bob"):
        with pytest.raises(ClientError, match="RepositoryNotFoundError|Repository [Nn]ot [Ff]ound"):
            run(pull_with_tickets, base, "org/secret", rename="auto", user=user)
    assert len(run(pull_with_tickets, base, "org/secret", rename="auto", user=None, token="hf_ann")["outputs"]) == 6
    run(push_tickets, base, "org/secret", routes=["ant"], revision="small")
    run(push_tickets, base, "org/secret", routes=["bee", "cat"], create_pr=True)
    for revision, count in (("small", 1), ("refs/pr/1", 2), ("main", 3)):
        user = run(pull_with_tickets, base, "org/secret", rename="auto", revision=revision)
        assert len(user["route_names"]) == 3 + count
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        run(pull_with_tickets, base, "org/secret", revision="nowhere")


def test_a_failed_push_of_tickets_changes_nothing(hub, run, base, monkeypatch):
    name = "org/failing-tickets"
    run(push_tickets, base, name)
    before = dict(hub.repos[name].refs)
    with pytest.raises(ClientError, match="A commit has happened since"):
        run(push_tickets, base, name, routes=["ant"], parent_commit="0" * 40)

    def break_off(method, path):
        if "/commit/" in path:
            raise HubError(400, "the line was cut")

    monkeypatch.setattr(hub, "before_request", break_off)
    with pytest.raises(ClientError, match="the line was cut"):
        run(push_tickets, base, name, routes=["ant"])
    assert hub.repos[name].refs == before


def test_other_tickets_than_those_of_this_base_are_refused(run, base):
    with pytest.raises(ClientError, match=f"ValueError: '{base}' holds no tickets.*RTLModel.from_pretrained"):
        run(pull_with_tickets, base, base)
    with pytest.raises(ClientError, match="RepositoryNotFoundError"):
        run(pull_with_tickets, base, "org/no-such-tickets")
    run(push, "org/other-base", seed=5)
    run(push_tickets, "org/other-base", "org/others")
    message = r"ValueError: the tickets of 'org/others' were made from another base, which is 'org/other-base' at rev"
    with pytest.raises(ClientError, match=message):
        run(pull_with_tickets, base, "org/others", rename="auto")


def test_a_model_that_was_pushed_knows_where_it_is(hub, run):
    run(push_model_and_tickets, "org/fresh", "org/fresh-tickets")
    index = json.loads(hub.repos["org/fresh-tickets"].at("main").files["tickets.json"].data)
    assert (index["base"]["repo"], index["base"]["revision"]) == ("org/fresh", hub.repos["org/fresh"].at("main").oid)
    assert run(base_fingerprint, "org/fresh") == index["base"]
    # A copy elsewhere is of the same base.
    run(copy_repo, "org/fresh", "org/copy")
    assert run(base_fingerprint, "org/copy") == index["base"]


def test_tickets_without_neurons_come_back(hub, run):
    base, name = "org/neurons", "org/neuron-tickets"
    whole = run(push, base, "neurons")
    run(push_tickets, base, name)
    index = json.loads(hub.repos[name].at("main").files["tickets.json"].data)
    assert index["format_version"] == 2 and "private_kept" in index["tickets"][0]["coding"]
    user = run(pull_with_tickets, base, name, ["ant"], drop="ant")
    assert user["route_names"] == ["bee", "cat", "ant"] and user["outputs"] == whole["outputs"]
    assert len({str(output) for output in user["outputs"].values()}) == 3


@pytest.mark.parametrize("kind", ["timm", "vit", "bert", "neurons"])
def test_a_compact_push_gives_the_same_tickets(hub, run, kind):
    name = f"org/compact-{kind}"
    pushed = run(push_compact, name, kind)
    config = json.loads(hub.repos[name].at("main").files["config.json"].data)
    assert config["format_version"] == (2 if kind == "neurons" else 1)
    pulled = run(pull, name)
    assert {key: value for key, value in pulled.items() if key != "tensors"} == pushed
    run(push, name, kind)
    assert {key: value for key, value in run(pull, name).items() if key != "tensors"} == pushed
