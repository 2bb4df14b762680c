"""Files of earlier versions: this version reads models and tickets, and continues a run that had not ended."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_rtl import ByColumn, RTLModel, RTLModelForImageClassification, load_rule
from hf_rtl.modeling.hashing import hash_file
from hf_rtl.training import rounds, run_identity
from hf_rtl.training.run_directory import RunDirectory
from hf_rtl.training.ticket_trainer import named_state
from tests.earlier_files import write


FOLDERS = sorted((Path(__file__).parent / "earlier_files").glob("20*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def assert_answers(model, folder, kind, routes=(-1, 0, 1, 2)):
    expected = load_file(folder / "answers.safetensors")
    for route in routes:
        found = model(pixel_values=write.images(), route_ids=route).logits
        torch.testing.assert_close(found, expected[f"{kind}.{route}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["model", "compact"])
def test_models_answer_as_they_did(folder, kind):
    model = RTLModel.from_pretrained(folder / kind).eval()
    assert type(model) is RTLModelForImageClassification and model.route_names == write.ROUTES
    assert_answers(model, folder, kind)


def test_a_compact_model_keeps_its_thresholds_and_a_model_its_rule(folder):
    assert RTLModel.from_pretrained(folder / "compact").config.thresholds == [0.25, -0.5, 0.125]
    assert load_rule(folder / "model") == ByColumn("label", write.ROUTES)


def test_a_compact_model_is_saved_again_as_it_was(folder, tmp_path):
    """Earlier versions read it."""
    RTLModel.from_pretrained(folder / "compact").save_pretrained(tmp_path, compact=True)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "compact", tmp_path)]
    assert all(configs[0][name] == configs[1][name] for name in ("format_version", "compact", "mask_fingerprint"))
    tensors, again = (load_file(path / "model.safetensors") for path in (folder / "compact", tmp_path))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_tickets_are_saved_again_as_they_were(folder, tmp_path):
    index = RTLModel.from_pretrained(folder / "model").save_tickets(tmp_path)
    assert index["format_version"] == 1
    for entry in json.loads((folder / "tickets" / "tickets.json").read_text())["tickets"]:
        (again,) = (found for found in index["tickets"] if found["name"] == entry["name"])
        assert again["coding"] == entry["coding"]
        assert (tmp_path / again["file"]).read_bytes() == (folder / "tickets" / entry["file"]).read_bytes()


def test_tickets_fit_their_base(folder):
    model = RTLModel.from_pretrained(folder / "model").eval()
    for name in ("ant", "cat"):
        model.drop_route(name)
    assert model.load_tickets(folder / "tickets", ["cat", "ant"]) == ["cat", "ant"]
    expected = load_file(folder / "answers.safetensors")
    for route, name in enumerate(write.ROUTES):
        found = model(pixel_values=write.images(), route_ids=name).logits
        torch.testing.assert_close(found, expected[f"model.{route}"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def stopped_run(folder, tmp_path):
    """The directory of a run that stopped in its second round, and the model that it began with."""
    shutil.copytree(folder / "run", tmp_path / "run")
    model = write.membership_model()
    model.backbone.load_state_dict(load_file(tmp_path / "run" / "theta0.safetensors"))
    return tmp_path / "run", model


@pytest.mark.slow
def test_a_run_that_had_not_ended_goes_on(stopped_run):
    folder, model = stopped_run
    before = {path: hash_file(path) for path in folder.rglob("*") if path.is_file()}
    trainer = write.trainer(folder, model)
    trainer.train()
    assert {path: hash_file(path) for path in before} == before  # The first round is not done again.
    assert [report["sparsity"] for report in trainer.rounds] == [0.3, 0.6]
    final = RTLModel.from_pretrained(folder / "final")
    directory, bank = RunDirectory(folder), final.mask_bank
    for route in range(3):
        first = bank.unpack(directory.load_mask(1, route))
        assert sum(int(mask.sum()) for mask in bank[route]) == bank.num_weights - round(0.6 * bank.num_weights)
        assert all(bool((mask <= earlier).all()) for mask, earlier in zip(bank[route], first, strict=True))


def test_a_run_is_still_told_from_another(stopped_run):
    folder, model = stopped_run
    with pytest.raises(ValueError, match="learning_rate: 0.001 there, 0.5 now"):
        open_run(folder, model, learning_rate=0.5)


def open_run(folder, model, **values):
    """Continues a run up to the check whether it is the same."""
    trainer = write.trainer(folder, model, **values)
    initial = dict(named_state(model.backbone))
    rounds.open_run(trainer, trainer.run_directory, trainer.plan(), initial)


def remove_field(folder, name):
    for file in (folder / "run.json", folder / "extraction" / "extraction.json"):
        content = json.loads(file.read_text())
        configuration = content["configuration"]
        places = [configuration, *(values for values in configuration.values() if isinstance(values, dict))]
        places += [place["backbone_config"] for place in places if "backbone_config" in place]
        assert any([place.pop(name, places) is not places for place in places]) or "extraction" in str(file)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["competing_epochs", "prune_scope", "norm_statistics", "do_pooling"])
def test_a_field_that_a_file_lacks_has_its_default(stopped_run, name):
    """The field may be of the arguments, of a model's configuration or of its backbone's."""
    folder, model = stopped_run
    remove_field(folder, name)
    open_run(folder, model)


def test_a_field_that_a_file_lacks_is_no_excuse_for_another_value(stopped_run):
    folder, model = stopped_run
    remove_field(folder, "prune_scope")
    with pytest.raises(ValueError, match='prune_scope: "global" there, "layer" now'):
        open_run(folder, model, prune_scope="layer")


def test_a_new_field_may_give_its_value_for_earlier_runs(monkeypatch):
    @dataclass
    class Arguments:
        known: int = 1
        new: int = field(default=5, metadata={"before": 0})

    monkeypatch.setattr(run_identity, "RTLTrainingArguments", Arguments)
    backbone = {"backbone_config": {"model_type": "vit"}}
    found = run_identity.with_later_fields({"known": 2, **backbone}, {"known": 2, "new": 5, **backbone})
    assert (found["known"], found["new"]) == (2, 0)
    found = run_identity.with_later_fields({"known": 2, "new": 7, **backbone}, {"known": 2, "new": 5, **backbone})
    assert found["new"] == 7
