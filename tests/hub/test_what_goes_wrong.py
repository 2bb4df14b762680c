"""Failed pushes and pulls of models: the errors name the cause, and nothing is lost."""

import json

import pytest
from safetensors.torch import load, save

from tests.hub.clients.repositories import call, pull, pull_impatiently, push, push_view
from tests.hub.clients.runs import SHORT, train_then_push, train_then_push_twice
from tests.hub.processes import ClientError
from tests.hub.server import ConnectionCut, File, HubError


LOADERS = ("RTLModel", "AutoModelForImageClassification")


@pytest.fixture
def fail(hub, monkeypatch):
    """
    `fail(matches, error, after=0, times=1000)` answers requests whose method and path match with an error, `times`
    times, after the first `after` requests; `times=0` ends that. Returns a list of the failed requests.
    """

    def fail(matches, error=None, *, after=0, times=1000):
        matched, failed = [], []

        def before_request(method, path):
            if matches(method, path):
                matched.append(path)
                if after < len(matched) <= after + times:
                    failed.append(path)
                    raise error or HubError(400, "the line was cut")

        monkeypatch.setattr(hub, "before_request", before_request)
        return failed

    return fail


# Users without permission


@pytest.mark.parametrize(
    "user, message",
    [("mallory", "Invalid credentials"), (None, "Invalid username or password"), ("bob", "don't have write access")],
)
def test_a_push_without_permission_is_refused(hub, run, user, message):
    run(push, "org/owned", seed=0)
    before = dict(hub.repos["org/owned"].refs)
    with pytest.raises(ClientError, match=message):
        run(push, "org/owned", seed=1, user=user)
    assert hub.repos["org/owned"].refs == before


def test_a_pull_without_permission_is_refused(run):
    run(push, "org/guarded", private=True)
    for loader in LOADERS:
        with pytest.raises(ClientError, match="(?s)OSError: .*org/guarded.*401.*Invalid credentials"):
            run(pull, "org/guarded", loader, user="mallory")
        for user in (None, "bob"):
            with pytest.raises(ClientError, match="(?s)OSError: org/guarded is not .*private .*pass a token"):
                run(pull, "org/guarded", loader, user=user)


# Missing repositories and revisions


def test_missing_repositories_and_revisions_are_named(run):
    run(push, "org/there")
    for loader in LOADERS:
        with pytest.raises(ClientError, match="OSError: org/nothing is not a local folder"):
            run(pull, "org/nothing", loader)
        for revision in ("nowhere", "refs/pr/7", "0" * 40):
            with pytest.raises(ClientError, match=f"OSError: {revision} is not a valid git identifier"):
                run(pull, "org/there", loader, revision=revision)


def test_a_repository_without_a_model(run):
    run(call, "create_repo", "org/empty")
    with pytest.raises(ClientError, match="ValueError: there is no `config.json`.*load_tickets"):
        run(pull, "org/empty")
    with pytest.raises(ClientError, match="ValueError: Unrecognized model in org/empty"):
        run(pull, "org/empty", "AutoModelForImageClassification")


# Damaged models


def change_config(**changes):
    def change(files):
        config = json.loads(files["config.json"].data)
        return {**files, "config.json": File(json.dumps({**config, **changes}).encode())}

    return change


def change_tensors(edit):
    """`edit` changes a dict of tensors."""

    def change(files):
        tensors = load(files["model.safetensors"].data)
        edit(tensors)
        return {**files, "model.safetensors": File(save(tensors, {"format": "pt"}), large=True)}

    return change


def flip_a_bit(tensors):
    tensors["mask_bank.m0001"][1, 3] ^= 4


def set_padding(tensors):
    assert tensors["mask_bank.m0001"].shape[1] == 41  # bytes, of 18 * 18 bits
    tensors["mask_bank.m0001"][0, -1] |= 0b10000000


def cut_columns(tensors):
    tensors["mask_bank.m0001"] = tensors["mask_bank.m0001"][:, :-1].contiguous()


def cut_routes(tensors):
    for name in [name for name in tensors if name.startswith("mask_bank.")]:
        tensors[name] = tensors[name][:2].contiguous()


def remove_a_mask(tensors):
    del tensors["mask_bank.m0001"]


def remove_masks(tensors):
    for name in [name for name in tensors if name.startswith("mask_bank.")]:
        del tensors[name]


def add_a_mask(tensors):
    tensors["mask_bank.m9999"] = tensors["mask_bank.m0001"].clone()


def swap_routes(tensors):
    for name in [name for name in tensors if name.startswith("mask_bank.")]:
        tensors[name] = tensors[name][[1, 0, 2]].contiguous()


CHANGES = {
    "a-flipped-bit": (change_tensors(flip_a_bit), "masks have the fingerprint"),
    "swapped-routes": (change_tensors(swap_routes), "masks have the fingerprint"),
    "another-fingerprint": (change_config(mask_fingerprint="0" * 64), "masks have the fingerprint"),
    "no-fingerprint": (change_config(mask_fingerprint=None), "no `mask_fingerprint`"),
    "padding": (change_tensors(set_padding), "padding"),
    "short-masks": (change_tensors(cut_columns), r"has wrong sizes of 1 tensor\(s\).*mask_bank.m0001"),
    "fewer-routes": (change_tensors(cut_routes), "has wrong sizes of .*mask_bank.m0000"),
    "a-missing-mask": (change_tensors(remove_a_mask), r"lacks 1 tensor\(s\).*mask_bank.m0001"),
    "missing-masks": (change_tensors(remove_masks), "lacks .*mask_bank.m0000"),
    "a-foreign-mask": (change_tensors(add_a_mask), r"has unknown 1 tensor\(s\).*mask_bank.m9999"),
    "a-newer-format": (change_config(format_version=99), "format 99.*formats up to 2.*Update hf_rtl"),
    "another-kind": (lambda files: {**files, "config.json": File(b'{"model_type": "vit"}')}, "'vit', .*no tickets"),
}


@pytest.fixture(scope="module")
def odd_model(hub, _clients, tmp_path_factory):
    """A repository whose branches are changed models."""
    _clients.run(push, ("org/changed", "odd"), {}, tmp_path_factory.mktemp("changed"), "hf_alice")
    repo = hub.repos["org/changed"]
    for branch, (change, _) in CHANGES.items():
        repo.commit(f"refs/heads/{branch}", change(repo.at("main").files), "Change", "alice")
    hub.large_files.update({file.oid: file.data for c in repo.commits.values() for file in c.files.values()})
    return repo.name


@pytest.mark.parametrize("branch", CHANGES)
def test_a_model_that_was_changed_is_refused(run, odd_model, branch):
    with pytest.raises(ClientError, match=f"(?s)ValueError: .*{CHANGES[branch][1]}"):
        run(pull, odd_model, revision=branch)


# Pushes that fail


REQUESTS = {
    "the choice of storage": lambda method, path: "/preupload/" in path,
    "the announcement of large files": lambda method, path: path.endswith("/info/lfs/objects/batch"),
    "an upload": lambda method, path: method == "PUT",
    "the commit": lambda method, path: "/commit/" in path,
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_push_that_fails_changes_nothing(hub, run, fail, request_):
    name = "org/" + request_.replace(" ", "-")
    pushed = run(push, name, seed=0)
    before = dict(hub.repos[name].refs)
    # The second of several uploads fails, after the first has succeeded.
    failed = fail(REQUESTS[request_], after=1 if request_ == "an upload" else 0)
    with pytest.raises(ClientError, match="the line was cut"):
        run(push, name, seed=len(name), max_shard_size="10KB")
    assert failed and hub.repos[name].refs == before
    fail(REQUESTS[request_], times=0)
    # The same push can be done again.
    again = run(push, name, seed=len(name), max_shard_size="10KB")
    assert again != pushed and run(pull, name) == again


@pytest.mark.parametrize("request_", list(REQUESTS)[2:])
def test_a_trainers_push_that_fails_changes_nothing_and_can_be_done_again(hub, run, fail, request_):
    name = "org/run-" + request_.replace(" ", "-")
    run(push, name, "vit", seed=3)
    first = hub.repos[name].at("main")
    failed = fail(REQUESTS[request_], times=1)
    failure, trained = run(train_then_push_twice, hub_model_id=name, seed=len(name), **SHORT)
    assert len(failed) == 1 and "the line was cut" in failure
    assert hub.repos[name].at("main").parent == first.oid
    assert run(pull, name) == trained


def test_a_push_upon_another_state_is_refused_and_changes_nothing(hub, run):
    name = "org/stale"
    first = run(push, name, seed=0)
    parent = hub.repos[name].at("main").oid
    second = run(push, name, seed=1, parent_commit=parent)
    assert second != first
    before = dict(hub.repos[name].refs)
    with pytest.raises(ClientError, match="(?s)412 Precondition Failed.*A commit has happened since"):
        run(push, name, seed=2, parent_commit=parent)
    assert hub.repos[name].refs == before
    assert run(pull, name) == second


@pytest.mark.parametrize("who", ["model", "trainer"])
def test_a_push_during_another_one_is_refused_and_loses_nothing(hub, run, monkeypatch, who):
    name = f"org/concurrent-{who}"
    run(push, name, seed=0)
    repo = hub.repos[name]

    def interfere(method, path):
        if "/preupload/" in path:
            hub.before_request = lambda method, path: None
            repo.commit("refs/heads/main", {**repo.at("main").files, "notes.md": File(b"Mine")}, "Note", "ann")

    monkeypatch.setattr(hub, "before_request", interfere)
    with pytest.raises(ClientError, match="A commit has happened since"):
        if who == "model":
            run(push, name, seed=1)
        else:
            run(train_then_push, {}, hub_model_id=name, **SHORT)
    assert repo.at("main").title == "Note"


def test_a_view_with_a_fixed_route_is_not_pushed(hub, run):
    with pytest.raises(ClientError, match="ValueError: .* on a view with a fixed route"):
        run(push_view, "org/view")
    assert "org/view" not in hub.repos


# Pulls that fail


def is_weights(method, path):
    return method == "GET" and len(path) == 65  # The path of a large file is a hash.


def is_config(method, path):
    return method == "GET" and path.endswith("/config.json")


@pytest.mark.parametrize(
    "matches, after, options",
    [(is_weights, 0, {}), (is_weights, 1, {"max_shard_size": "10KB"}), (is_config, 0, {})],
    ids=["weights", "the-second-shard", "the-configuration"],
)
def test_a_pull_that_fails_leaves_the_cache_usable(hub, run, fail, tmp_path, matches, after, options):
    name = f"org/{matches.__name__.replace('_', '-')}-{after}"
    cache = {"cache_dir": str(tmp_path / "shared")}
    old = run(push, name, seed=0, **options)
    old_commit = hub.repos[name].at("main").oid
    assert run(pull, name, **cache) == old
    new = run(push, name, seed=1, **options)

    failed = fail(matches, ConnectionCut(), after=after)
    with pytest.raises(ClientError, match=f"OSError: .*{name}|peer closed connection"):
        run(pull_impatiently, name, **cache)
    assert failed
    # The cache still has the old commit, and no half of the new one.
    assert run(pull, name, revision=old_commit, local_files_only=True, **cache) == old
    assert not list((tmp_path / "shared").rglob("*.incomplete"))
    fail(matches, times=0)
    assert run(pull, name, **cache) == new
    assert run(pull, name, local_files_only=True, **cache) == new


def test_a_pull_goes_on_where_it_was_cut(hub, run, fail, monkeypatch):
    pushed = run(push, "org/interrupted")
    monkeypatch.setattr(hub, "ranges", [])
    failed = fail(is_weights, ConnectionCut(), times=2)
    assert run(pull_impatiently, "org/interrupted") == pushed
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in hub.ranges]
    assert len(failed) == 2 and len(starts) == 2 and 0 < starts[0] < starts[1]
