"""The start of trainings, and the results of a run."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hf_rtl import RTLModel, RTLModelForImageClassification
from hf_rtl.modeling.files import read_tensors
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.training import extraction
from hf_rtl.training.progress import RunProgress
from hf_rtl.training.run_directory import RunDirectory
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state
from tests.training.small_runs import (
    ROUNDS,
    ROUTES,
    Broken,
    Images,
    Recorder,
    bits,
    contents,
    files,
    image_model,
    make_trainer,
    masks_on_disk,
    run,
    same,
    timeless,
)


def test_tickets_keep_exactly_what_was_asked_for(finished):
    total = finished.trainer.model.mask_bank.num_weights
    for sparsity, name, report in zip([0.3, 0.6], ROUNDS, finished.rounds, strict=True):
        bank = RTLModel.from_pretrained(finished.folder / name).mask_bank
        expected = total - round(sparsity * total)
        assert [sum(int(mask.sum()) for mask in bank[route]) for route in ROUTES] == [expected] * 3
        assert report["kept"] == dict.fromkeys(ROUTES, expected)
        assert report["folder"] == name
        assert report["union"] == sum(int(mask.sum()) for mask in bank.union()) > expected
        assert report["core"] == sum(int(mask.sum()) for mask in bank.core()) < expected
        assert report["mask_fingerprint"] == bank.fingerprint()


def test_masks_are_nested_over_events_and_rounds(finished):
    model = finished.trainer.model
    found = masks_on_disk(finished.folder, model)
    plan = finished.trainer.plan()
    kept = list(chain(*(round_.kept for round_ in plan.rounds)))
    assert len(kept) > 2
    assert set(found) == {(event, route) for event in range(len(kept)) for route in range(3)}
    for route in range(3):
        before = [torch.ones(shape, dtype=torch.bool) for shape in model.mask_bank.shapes]
        for event, num_kept in enumerate(kept):
            masks = found[event, route]
            assert sum(int(mask.sum()) for mask in masks) == num_kept
            assert all((mask <= old).all() for mask, old in zip(masks, before, strict=True))
            before = masks
        final = RTLModel.from_pretrained(finished.folder / "final").mask_bank[route]
        assert all(torch.equal(*pair) for pair in zip(final, before, strict=True))
    different = {
        tuple(bits(torch.cat([m.flatten() for m in found[len(kept) - 1, route]])).tolist()) for route in range(3)
    }
    assert len(different) == 3


def test_every_event_started_from_masked_initial_weights(finished):
    model = finished.trainer.model
    theta0 = {name: tensor.detach().clone() for name, tensor in named_state(image_model().backbone)}
    stored = read_tensors(finished.folder / "theta0.safetensors")
    assert stored.keys() == theta0.keys()
    assert all(same(stored[name], theta0[name]) for name in theta0)
    found = masks_on_disk(finished.folder, model)
    full = [torch.ones(shape, dtype=torch.bool) for shape in model.mask_bank.shapes]
    for event, route in found:
        masks = full if event == 0 else found[event - 1, route]
        start = dict(theta0)
        for name, mask in zip(model.mask_bank.weight_names, masks, strict=True):
            start[name] = torch.where(mask, theta0[name], 0.0)
        with safe_open(RunDirectory(finished.folder).mask_file(event, route), "pt") as file:
            assert json.loads(file.metadata()["hf_rtl"])["started_from"] == hash_tensors(start)


def test_every_joint_retraining_starts_from_the_initial_weights(finished):
    theta0 = dict(named_state(image_model().backbone))
    assert len(finished.recorded.starts) == 2
    for backbone, rows in finished.recorded.starts:
        assert backbone.keys() == theta0.keys()
        assert all(same(backbone[name], theta0[name]) for name in theta0)
        tracked = [tensor for name, tensor in theta0.items() if "running_" in name or "num_batches" in name]
        assert len(rows) == len(tracked) > 0
        for row, tensor in zip(rows, tracked, strict=True):
            assert all(same(each, tensor) for each in row)
    for report in finished.rounds:
        assert report["started_from"] == hash_tensors(theta0)


def test_weights_that_no_ticket_keeps_are_the_initial_ones(finished):
    theta0 = dict(named_state(image_model().backbone))
    for name in ROUNDS:
        model = RTLModel.from_pretrained(finished.folder / name)
        trained = dict(named_state(model.backbone))
        moved = 0
        for weight, union in zip(model.mask_bank.weight_names, model.mask_bank.union(), strict=True):
            changed = trained[weight].view(torch.int32) != theta0[weight].view(torch.int32)
            assert not changed[~union].any()
            moved += int(changed[union].sum())
        assert moved > 0.5 * model.mask_bank.union_count()
        head = "timm_model.fc.weight"
        assert not torch.equal(trained[head], theta0[head])


def test_every_round_is_a_whole_model_that_repeats_its_metrics(finished, tmp_path):
    for name, report in zip(ROUNDS, finished.rounds, strict=True):
        model = RTLModelForImageClassification.from_pretrained(finished.folder / name)
        again = make_trainer(tmp_path / "unused", model).evaluate()
        expected = timeless(report["metrics"])
        assert {"eval_loss", "eval_balanced_accuracy", "eval_ant/auroc", "eval_constant_tickets"} <= expected.keys()
        assert timeless(again) == expected


@pytest.mark.slow
def test_the_statistics_of_the_union_are_averages_over_all_samples(tmp_path):
    data = Images(24)
    for batches in (50, 1):
        model = image_model()
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # as a pretrained network has them
                module.running_mean.fill_(5)
                module.num_batches_tracked.fill_(100)
        made = run(tmp_path / str(batches), model, train=data, target_sparsity=[0.3], recalibration_batches=batches)
        statistics = dict(made.model.norm_statistics.named_buffers())
        mean, variance, count = (statistics[name][-1] for name in ("s0000", "s0001", "s0002"))
        backbone = made.model.extract_ticket(-1)
        x = backbone.timm_model.conv1(torch.stack([sample["pixel_values"] for sample in data.samples]))
        if batches == 50:
            assert count == 3  # batches of 8
            assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-5)
            assert torch.allclose(variance, x.var((0, 2, 3)), rtol=0.2)
        else:
            assert count == 1
            assert not torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-5)
        rows = [row for name, row in statistics.items() if row.dtype == torch.int64]
        own = min(batches, 2)  # A route has 8 samples and as many negatives, which are 2 batches.
        assert all(row.tolist() == [own, own, own, int(count)] for row in rows)


def test_the_end_is_the_last_round(finished):
    last, final = finished.folder / ROUNDS[-1], finished.folder / "final"
    names = {path.name for path in final.iterdir()}
    assert {"config.json", "model.safetensors", "training_args.json", "training_run.json"} <= names
    for name in names - {"training_run.json"}:
        assert (final / name).read_bytes() == (last / name).read_bytes()
    first = (finished.folder / ROUNDS[0] / "model.safetensors").read_bytes()
    assert first != (last / "model.safetensors").read_bytes()


def test_the_model_in_memory_is_the_saved_one(finished):
    saved = load_file(finished.folder / "final" / "model.safetensors")
    live = finished.trainer.model.state_dict()
    assert all(same(live[name], tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_folders_hold_safetensors_and_json_alone(finished, tmp_path):
    run(tmp_path / "run", save_strategy="steps", save_steps=2)
    for folder in (finished.folder, tmp_path / "run"):
        for path in files(folder):
            assert path.endswith((".json", ".safetensors")) or "/checkpoint-" in path, path
    assert list((tmp_path / "run" / ROUNDS[0]).glob("checkpoint-*"))
    assert not list((tmp_path / "run" / "final").glob("checkpoint-*"))
    assert not [path for path in files(tmp_path / "run") if path.endswith("training_args.bin")]


def test_saved_arguments_name_no_folder(finished, tmp_path):
    made = run(tmp_path / "run", extraction_dir=str(tmp_path / "masks"), target_sparsity=[0.3])
    for folder in (finished.folder / "final", finished.folder / ROUNDS[0], made.run_directory.final_folder):
        text = (folder / "training_args.json").read_text()
        saved = json.loads(text)
        assert saved["target_sparsity"] in ([0.3, 0.6], [0.3])
        assert saved["learning_rate"] == 1e-3
        for path in (tmp_path, finished.folder, Path.home()):
            assert str(path) not in text
    assert str(tmp_path) not in (tmp_path / "run" / "final" / "config.json").read_text()


@pytest.mark.slow
def test_an_evaluation_after_a_run_is_logged_at_its_last_step(tmp_path):
    recorded = Recorder()
    made = run(tmp_path / "run", callbacks=[recorded])
    last = max(step for step, _ in recorded.logs)
    made.evaluate()
    assert (recorded.logs[-1][0], last) == (12, 12)


def test_logged_steps_count_over_all_rounds(finished):
    report = finished.rounds[-1]
    losses = [entry for entry in report["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, 13))
    assert [entry["round"] for entry in losses] == [1] * 6 + [2] * 6
    evaluations = [(entry["step"], entry["round"]) for entry in report["log_history"] if "eval_loss" in entry]
    assert evaluations == [(6, 1), (12, 2)]
    seen = [step for step, logs in finished.recorded.logs if "loss" in logs]
    assert seen == list(range(1, 13))
    assert finished.trainer.state.global_step == 6  # Trainer's own count, of the round


def test_callbacks_are_called(finished):
    expected = {"train_begin": 2, "step_end": 12, "evaluate": 2, "train_end": 2}
    assert {name: finished.recorded.calls[name] for name in expected} == expected


@pytest.mark.slow
def test_the_plan_is_what_happens(tmp_path):
    for epochs, steps in ((0.4, 3), (1.5, 9)):
        made = make_trainer(tmp_path / str(epochs), num_train_epochs=epochs, target_sparsity=[0.3])
        output = made.train()
        assert made.plan().retraining_steps == steps
        assert output.global_step == steps


def test_the_output_of_train(finished, tmp_path):
    output = make_trainer(finished.folder).train()
    assert output.global_step == 12
    assert output.training_loss == finished.rounds[-1]["train_loss"]
    assert output.metrics == finished.rounds[-1]["metrics"]


def test_every_event_of_every_route_draws_its_own_noise_and_batches(tmp_path, monkeypatch):
    seeds, drawn = [], []
    train = TicketTrainer.train

    def watched(self, masks, batches, *, seed, on_step):
        batches = list(batches)
        seeds.append(seed)
        drawn.append(tuple(float(batch["pixel_values"].sum()) for batch in batches))
        return train(self, masks, batches, seed=seed, on_step=on_step)

    monkeypatch.setattr(TicketTrainer, "train", watched)
    run(tmp_path / "run", target_sparsity=[0.3, 0.6], retrain_every_round=False)
    assert len(seeds) == len(set(seeds)) == len(set(drawn)) == 9


@pytest.mark.slow
def test_a_route_trains_for_its_own_number_of_steps(tmp_path, monkeypatch):
    steps = Counter()
    begin_route, step = RunProgress.begin_route, TicketTrainer.step

    def watched_begin(self, name, *positional):
        steps["route"] = name
        begin_route(self, name, *positional)

    def watched_step(self, batch):
        steps[steps["route"]] += 1
        return step(self, batch)

    monkeypatch.setattr(RunProgress, "begin_route", watched_begin)
    monkeypatch.setattr(TicketTrainer, "step", watched_step)
    data = Broken(24, lambda index, sample: {**sample, "label": min(index // 4, 2)})  # 4, 4 and 16 samples
    for epochs, expected in ((1.0, [1, 1, 4]), (1.5, [2, 2, 6]), (0.1, [1, 1, 1])):
        steps.clear()
        options = {"extraction_steps": None, "extraction_epochs": epochs, "num_train_epochs": 0.01}
        made = run(tmp_path / str(epochs), train=data, target_sparsity=[0.3], **options)
        assert made.plan().extraction_steps == [steps[name] for name in ROUTES] == expected


def test_extraction_takes_the_options_of_training(tmp_path):
    made = make_trainer(tmp_path, max_grad_norm=0.5, learning_rate=0.25, adam_beta1=0.5, weight_decay=0.125)
    made.args.mixed_precision = "fp16"  # refused on a CPU, so not given
    ticket = made.ticket_trainer(dict(named_state(made.model.backbone)))
    assert (ticket.max_grad_norm, ticket.fp16) == (0.5, True)
    assert ticket.network is not made.model.backbone
    optimizer = ticket.make_optimizer(ticket.network)
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    assert {(group["lr"], group["betas"][0], group["fused"]) for group in groups} == {(0.25, 0.5, True)}
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]
    assert [len(group["params"]) for group in groups] == [7, 4]  # Trainer's groups: batch norm's weights decay


@pytest.mark.slow
def test_extraction_is_the_same_in_any_order(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "assign_routes", lambda costs, world_size: [[2, 0, 1]])
    made = run(tmp_path / "run")
    assert made.model.mask_bank.fingerprint() == finished.trainer.model.mask_bank.fingerprint()
    assert contents(tmp_path / "run") == contents(finished.folder)


@pytest.mark.slow
def test_equal_runs_are_equal_and_other_seeds_are_not(finished, tmp_path):
    run(tmp_path / "same")
    assert contents(tmp_path / "same") == contents(finished.folder)
    other = run(tmp_path / "other", seed=7, target_sparsity=[0.3])
    reports = [other.rounds[0], finished.rounds[0]]
    assert reports[0]["mask_fingerprint"] != reports[1]["mask_fingerprint"]


def test_a_card_that_cannot_be_written_costs_no_work(tmp_path, caplog, monkeypatch):
    def write_card(*_, **__):
        raise ValueError("no such card")

    monkeypatch.setattr("hf_rtl.training.trainer.write_card", write_card)
    made = run(tmp_path, target_sparsity=[0.3], max_steps=1)
    assert "its card could not be written" in caplog.text and "no such card" in caplog.text
    loaded = RTLModel.from_pretrained(tmp_path / "final")
    assert loaded.mask_bank.fingerprint() == made.model.mask_bank.fingerprint()
