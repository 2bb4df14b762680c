"""Interrupted runs: the continued run ends as an uninterrupted one."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_rtl import RTLModel, RTLModelForImageClassification
from hf_rtl.modeling.files import write_json
from hf_rtl.modeling.hashing import hash_file
from hf_rtl.training.extraction import Extraction
from hf_rtl.training.run_directory import RunDirectory
from tests.training.interruptions import StopAtStep, StopError, interrupt
from tests.training.small_runs import (
    ROUNDS,
    Images,
    Recorder,
    contents,
    files,
    image_model,
    make_trainer,
    run,
    same,
    timeless,
)


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}
# (place, whether there are checkpoints of every step) -> steps of joint retraining left to do.
PLACES = {
    (("prune", 5), False): 6,  # in the middle of the second round's extraction
    (("step", 4), False): 12,  # in the middle of the first joint retraining
    (("step", 4), True): 9,
    (("step", 9), False): 6,  # in the middle of the second joint retraining
    (("step", 9), True): 4,
    (("evaluation", 2), True): 0,  # the model is saved before
    (("report_round", 1), False): 12,  # the model is saved, but its report is not
    (("report_round", 1), True): 6,
}


@pytest.fixture(scope="module")
def break_off(tmp_path_factory):
    """`break_off(folder, place, **values)` fills `folder` with a run that broke off at `place`, which runs once."""

    @functools.cache
    def broken(place, values):
        folder = tmp_path_factory.mktemp("broken") / "run"
        with pytest.MonkeyPatch.context() as patched:
            interrupt(patched, folder, place, **dict(values))
        return folder

    def break_off(folder, place, **values):
        shutil.copytree(broken(place, tuple(values.items())), folder)

    return break_off


@pytest.mark.slow
@pytest.mark.parametrize(("place", "checkpoints"), PLACES)
def test_an_interrupted_run_is_continued_to_the_same_end(finished, tmp_path, break_off, place, checkpoints):
    saving = CHECKPOINTS if checkpoints else {}
    break_off(tmp_path / "run", place, **saving)
    assert "final/model.safetensors" not in contents(tmp_path / "run")
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **saving)
    assert contents(tmp_path / "run") == contents(finished.folder)
    assert recorded.calls["step_end"] == PLACES[place, checkpoints]
    reports = [json.loads((tmp_path / "run" / name / "round.json").read_text()) for name in ROUNDS]
    for report, expected in zip(reports, finished.rounds, strict=True):
        for key in ("kept", "union", "mask_fingerprint", "steps", "started_from"):
            assert report[key] == expected[key]
        assert timeless(report["metrics"]) == timeless(expected["metrics"])
    steps = [entry["step"] for entry in reports[1]["log_history"] if "loss" in entry]
    assert steps == list(range(1, 13))


@pytest.mark.slow
def test_the_same_trainer_continues_an_interrupted_run(finished, tmp_path, monkeypatch):
    """The trainer's model has been trained by then; θ0 must not have changed."""
    for place in (("step", 9), ("recalibrate", 2)):
        made = interrupt(monkeypatch, tmp_path / place[0] / str(place[1]), place)
        if place[0] == "step":
            made.remove_callback(StopAtStep)
        made.train()
        assert contents(made.args.output_dir) == contents(finished.folder)


def test_training_again_changes_nothing(finished):
    made = make_trainer(finished.folder)
    before = files(finished.folder)
    made.train()
    made.train(resume_from_checkpoint=True)
    after = files(finished.folder)
    assert after == before
    assert [report["mask_fingerprint"] for report in made.rounds] == [r["mask_fingerprint"] for r in finished.rounds]
    saved = load_file(finished.folder / "final" / "model.safetensors")
    assert all(same(made.model.state_dict()[name], tensor) for name, tensor in saved.items())


def test_an_interruption_of_recalibration_leaves_the_layers_as_they_were(tmp_path, monkeypatch):
    made = make_trainer(tmp_path, target_sparsity=[0.3])
    norms = [module for module in made.model.modules() if hasattr(module, "momentum")]
    momenta = [module.momentum for module in norms]
    original = RTLModelForImageClassification.forward

    @functools.wraps(original)
    def stopping(self, *positional, **keywords):
        if self.active.route == -1:
            raise StopError
        return original(self, *positional, **keywords)

    monkeypatch.setattr(RTLModelForImageClassification, "forward", stopping)
    with pytest.raises(StopError):
        made.train()
    assert [module.momentum for module in norms] == momenta != []
    assert not made.model.training


@pytest.mark.slow
def test_a_damaged_mask_is_made_again(finished, tmp_path, break_off):
    break_off(tmp_path / "run", ("step", 9))
    for event, route, damage in ((0, 1, "altered"), (1, 0, "cut"), (2, 2, "missing")):
        file = RunDirectory(tmp_path / "run").mask_file(event, route)
        content = bytearray(file.read_bytes())
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(content[:-1])
        else:
            content[-1] ^= 1
            file.write_bytes(content)
    run(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished.folder)


@pytest.mark.slow
def test_damaged_initial_weights_are_written_again(finished, tmp_path, break_off):
    break_off(tmp_path / "run", ("step", 4))
    (tmp_path / "run" / "theta0.safetensors").write_bytes(b"short")
    run(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished.folder)


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["half a state", "an altered optimizer", "no seal"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(finished, tmp_path, break_off, torn):
    saving = {**CHECKPOINTS, "save_total_limit": 3}
    break_off(tmp_path / "run", ("step", 5), **saving)
    checkpoint = tmp_path / "run" / ROUNDS[0] / "checkpoint-4"
    state = (checkpoint / "trainer_state.json").read_text()
    if torn == "no seal":
        (checkpoint / "checkpoint.json").unlink()
    elif torn == "an altered optimizer":
        content = bytearray((checkpoint / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(content)
    else:
        (checkpoint / "trainer_state.json").write_text(state[: len(state) // 2])
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **saving)
    assert recorded.calls["step_end"] == 3 + 6
    assert contents(tmp_path / "run") == contents(finished.folder)


@pytest.mark.slow
def test_a_failure_in_the_second_round_keeps_the_first_whole(finished, tmp_path, break_off):
    break_off(tmp_path / "run", ("step", 9))
    first = files(tmp_path / "run" / ROUNDS[0])
    assert first["model.safetensors"] == (finished.folder / ROUNDS[0] / "model.safetensors").read_bytes()
    assert {"config.json", "round.json", "training_args.json"} <= set(first)
    assert not (tmp_path / "run" / ROUNDS[1] / "round.json").exists()
    RTLModel.from_pretrained(tmp_path / "run" / ROUNDS[0])
    run(tmp_path / "run")
    assert files(tmp_path / "run" / ROUNDS[0]) == first


def test_mixed_precision_from_the_launcher_is_part_of_the_configuration(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = make_trainer(finished.folder)
    with pytest.raises(ValueError, match='mixed_precision: "no" there, "bf16" now'):
        made.train()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"num_train_epochs": 1.5}])
def test_a_run_that_broke_off_after_its_last_step_trains_no_more(tmp_path, monkeypatch, steps):
    """The last step is not the end of an epoch, so that Trainer would train one more step."""
    options = {"target_sparsity": [0.3], "save_strategy": "steps", "save_steps": 1, **steps}
    whole = run(tmp_path / "whole", **options)
    interrupt(monkeypatch, tmp_path / "run", ("recalibrate", 1), **options)
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **options)
    assert whole.rounds[0]["steps"] == {"max_steps": 4, "num_train_epochs": 9}[next(iter(steps))]
    assert recorded.calls["step_end"] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_model_with_nan_is_refused_also_when_it_is_continued(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    next(model.backbone.parameters()).fill_(float("nan"))

    options = {"target_sparsity": [0.3], "save_strategy": "steps", "save_steps": 1}
    made = make_trainer(tmp_path / "run", callbacks=[Spoil()], **options)
    for trainer in (made, make_trainer(tmp_path / "run", **options)):
        with pytest.raises(FloatingPointError, match="a weight became NaN"):
            trainer.train()
    assert not (tmp_path / "run" / ROUNDS[0] / "round.json").exists()


def test_a_damaged_model_of_a_round_is_retrained_again(finished, tmp_path, caplog):
    shutil.copytree(finished.folder, tmp_path / "run")
    file = tmp_path / "run" / ROUNDS[0] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded])
    assert recorded.calls["step_end"] == 6  # only the first round is retrained
    assert contents(tmp_path / "run") == contents(finished.folder)
    assert "the joint retraining is done again" in caplog.text


def test_a_model_that_lacks_tensors_is_not_continued_from(finished, tmp_path):
    for change in ("missing", "unknown"):
        folder = tmp_path / change
        shutil.copytree(finished.folder, folder)
        tensors = load_file(folder / ROUNDS[0] / "model.safetensors")
        if change == "missing":
            tensors.pop("norm_statistics.s0000")
        else:
            tensors["more"] = torch.ones(1)
        file = folder / ROUNDS[0] / "model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        report = json.loads((folder / ROUNDS[0] / "round.json").read_text())
        report["files"]["model.safetensors"] = hash_file(file)
        write_json(folder / ROUNDS[0] / "round.json", report)
        with pytest.raises(ValueError, match=f"does not fit the model.*1 (tensors )?{change}"):
            make_trainer(folder).train()


def test_another_configuration_is_refused_and_nothing_is_touched(finished, tmp_path):
    before = files(finished.folder)
    changes = [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 there, 0.002 now"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"target_sparsity": [0.3]}, "target_sparsity"),
        ({"model": image_model(seed=1)}, "initial_weights"),
        ({"model": image_model(norm_statistics="shared")}, "model.norm_statistics: .*extraction_dir='.*/extraction'"),
        ({"train": Images(30)}, "route_ids"),
    ]
    for change, named in changes:
        with pytest.raises(ValueError, match=f"another configuration.*{named}"):
            make_trainer(finished.folder, **change).train()
    with pytest.raises(ValueError, match="holds no run"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="must be True or None"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(finished.folder))
    assert files(finished.folder) == before
    assert files(tmp_path) == {}


@pytest.mark.slow
def test_runs_that_differ_in_statistics_share_one_extraction(tmp_path, monkeypatch):
    shared = str(tmp_path / "masks")
    first = run(tmp_path / "per_route", extraction_dir=shared)
    monkeypatch.setattr(Extraction, "train_and_prune", None)  # must not be called, since all masks exist
    second = run(tmp_path / "shared", image_model(norm_statistics="shared"), extraction_dir=shared)
    assert [r["mask_fingerprint"] for r in first.rounds] == [r["mask_fingerprint"] for r in second.rounds]
    assert not (tmp_path / "shared" / "extraction").exists()
    before = files(tmp_path)
    for change in ({"seed": 1}, {"model": image_model(drop_rate=0.5)}, {"model": image_model(seed=2)}):
        with pytest.raises(ValueError, match="another configuration"):
            make_trainer(tmp_path / "third", extraction_dir=shared, **change).train()
    assert {path: content for path, content in files(tmp_path).items() if path in before} == before
    assert not (tmp_path / "third" / "run.json").exists()
