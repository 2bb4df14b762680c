"""Rules of partitions that go to the Hub with a model, and come back by its name."""

import json

import pytest

from hf_rtl import ByColumn, save_rule
from tests.hub.clients.commands import command, save
from tests.hub.clients.repositories import call, push
from tests.hub.clients.rules import (
    FEATURES,
    RULES,
    assign,
    change_and_push,
    describe_rule,
    train_then_push_model,
    train_then_push_run,
)
from tests.hub.processes import ClientError


BOTH = {"partition.json", "partition.safetensors"}
ROUTES_OF_FEATURES = RULES["centres"].assign(FEATURES).route_ids.tolist()


def rule_files(repo):
    return {path for path in repo.at("main").files if path.startswith("partition")}


@pytest.mark.parametrize("train_then_push", [train_then_push_run, train_then_push_model])
def test_a_rule_is_pushed_with_the_model_of_a_run(hub, run, train_then_push):
    name = f"org/{train_then_push.__name__}"
    run(train_then_push, "centres", name)
    repo = hub.repos[name]
    assert rule_files(repo) == BOTH and len(repo.history()) == 2
    assert run(assign, name, 7) == ROUTES_OF_FEATURES
    assert "`hf_rtl.load_rule(" in repo.at("main").files["README.md"].data.decode()
    assert json.loads(run(command, "inspect", name, "--json"))["rule"] == RULES["centres"].describe()
    # A later model does not keep the rule of an earlier one, whose revision still has it.
    before = repo.at("main").oid
    run(train_then_push, "column", name)
    assert rule_files(repo) == {"partition.json"}
    assert run(describe_rule, name) == "what its column 'label' says"
    assert run(assign, name, revision=before) == ROUTES_OF_FEATURES
    run(train_then_push, "none", name)
    assert rule_files(repo) == set()
    with pytest.raises(ClientError, match=f"FileNotFoundError: '{name}' holds no rule: it has no partition.json"):
        run(describe_rule, name)


def test_copies_of_a_model_have_its_rule_until_their_routes_change(hub, run):
    run(train_then_push_run, "centres", "org/with-rule")
    assert run(change_and_push, "org/with-rule", "org/copy-with-rule") == []
    assert rule_files(hub.repos["org/copy-with-rule"]) == BOTH
    assert run(assign, "org/copy-with-rule") == ROUTES_OF_FEATURES
    (line,) = run(change_and_push, "org/with-rule", "org/copy-with-rule", drop="bee")
    assert "for other routes, 'ant', 'bee', 'cat', than those of the model, 'ant', 'cat'" in line
    assert rule_files(hub.repos["org/copy-with-rule"]) == set()
    run(push, "org/with-rule")
    assert rule_files(hub.repos["org/with-rule"]) == set()


def test_a_rule_for_other_routes_than_the_models_is_refused(hub, run, tmp_path):
    run(save, str(tmp_path / "model"))
    save_rule(tmp_path / "model", RULES["centres"])
    run(command, "push", str(tmp_path / "model"), "org/renamed")
    repo = hub.repos["org/renamed"]
    assert rule_files(repo) == BOTH and run(assign, "org/renamed") == ROUTES_OF_FEATURES
    config = tmp_path / "other.json"
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    config.write_text(json.dumps({**values, "route_names": ["ant", "cat", "bee"]}))
    run(call, "upload_file", path_or_fileobj=str(config), path_in_repo="config.json", repo_id="org/renamed")
    message = "is a rule for other routes, 'ant', 'bee', 'cat', than those of the model, 'ant', 'cat', 'bee'"
    with pytest.raises(ClientError, match=f"ValueError: .*partition.json {message}"):
        run(assign, "org/renamed")
    assert run(assign, "org/renamed", route_names=["ant", "bee", "cat"]) == ROUTES_OF_FEATURES
    # A push leaves such a rule out, and removes it from the repository.
    save_rule(tmp_path / "model", ByColumn("label", ["ant", "cat", "bee"]))
    sent = json.loads(run(command, "push", str(tmp_path / "model"), "org/renamed", "--json"))["files"]
    assert not BOTH & set(sent) and rule_files(repo) == set()
    assert (tmp_path / "model" / "partition.json").exists()


def test_rules_of_private_repositories_need_a_token(hub, run, tmp_path):
    run(save, str(tmp_path / "model"))
    save_rule(tmp_path / "model", RULES["centres"])
    run(command, "push", str(tmp_path / "model"), "org/secret-rule", "--private")
    assert run(assign, "org/secret-rule", token="hf_ann", user=None) == ROUTES_OF_FEATURES
    with pytest.raises(ClientError, match="RepositoryNotFoundError"):
        run(assign, "org/secret-rule", user="bob")
