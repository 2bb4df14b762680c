"""Whole runs on a few images: what trainings start from, what is saved, what an interruption changes (nothing)."""

import copy
import functools
import gc
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_rtl import (
    RTLModel,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    RTLTrainer,
    RTLTrainingArguments,
    extraction,
)
from hf_rtl.extraction import Extraction
from hf_rtl.files import hash_file, hash_tensors, read_tensors, write_json
from hf_rtl.metrics import calibrate_thresholds
from hf_rtl.optim import MaskedAdamW, MaskedSGD
from hf_rtl.progress import RunProgress
from hf_rtl.run_directory import RunDirectory
from hf_rtl.ticket_trainer import TicketTrainer, named_state


ROUTES = ["ant", "bee", "cat"]
DOMAINS = ("pixel_values", "labels", "domain")
ROUNDS = ["round-01-sparsity-0.3", "round-02-sparsity-0.6"]


class Images(Dataset):
    """Noise, brighter in the channel of the route. Fetched samples have more of it, as from random transforms."""

    def __init__(self, number, seed=0, columns=("pixel_values", "label"), num_routes=3, size=16, noise=0.0):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(number, 3, size, size, generator=generator)
        self.samples = []
        for index in range(number):
            route = index % num_routes
            pixels[index, route] += 1
            everything = {
                "pixel_values": pixels[index],
                "label": route,
                "domain": route,
                "labels": index // num_routes % 2,
            }
            self.samples.append({name: everything[name] for name in columns})
        self.noise = noise
        self.fetched = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.fetched.append(index)
        if not self.noise:
            return self.samples[index]
        pixels = self.samples[index]["pixel_values"]
        return {**self.samples[index], "pixel_values": pixels + self.noise * torch.randn(pixels.shape)}


class SmallNet(nn.Module):
    """Three convolutions with batch norm, and a head; some thousand weights."""

    def __init__(self, *, num_classes=2, in_chans=3, drop_rate=0.0):
        super().__init__()
        self.num_classes = num_classes
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(12, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(convolution(x)).relu()
        return self.fc(self.drop(x.mean((2, 3))))


default_cfgs = generate_default_cfgs({"small_net_for_tests.untrained": {"num_classes": 2, "classifier": "fc"}})


@register_model
def small_net_for_tests(pretrained=False, **arguments):
    return build_model_with_cfg(SmallNet, "small_net_for_tests", pretrained, **arguments)


def image_model(seed=0, routes=ROUTES, ticket_task="membership", drop_rate=0.2, **arguments):
    return RTLModelForImageClassification.from_backbone(
        "small_net_for_tests",
        route_names=routes,
        ticket_task=ticket_task,
        seed=seed,
        drop_rate=drop_rate,
        **arguments,
    )


def arguments(folder, **values):
    defaults = {
        "target_sparsity": [0.3, 0.6],
        "prune_amount": 0.3,
        "extraction_steps": 2,
        "num_train_epochs": 1,
        "route_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RTLTrainingArguments(output_dir=str(folder), **{**defaults, **values})


def make_trainer(folder, model=None, callbacks=(), train=None, evaluate=None, options=None, **values):
    return RTLTrainer(
        image_model() if model is None else model,
        arguments(folder, **values),
        train_dataset=Images(24, noise=0.1) if train is None else train,
        eval_dataset=Images(12, seed=1) if evaluate is None else evaluate,
        callbacks=list(callbacks),
        **(options or {}),
    )


def run(folder, *positional, **values):
    made = make_trainer(folder, *positional, **values)
    made.train()
    return made


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected():
    """accelerate collects garbage before every training, which takes half a second with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A membership run of two rounds that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recorded = Recorder()
    made = run(folder, callbacks=[recorded])
    return SimpleNamespace(folder=folder, trainer=made, rounds=made.rounds, recorded=recorded)


class Recorder(TrainerCallback):
    """Counts the calls, and keeps what the model was when a joint retraining began."""

    def __init__(self):
        self.calls, self.starts, self.logs = Counter(), [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.calls["train_begin"] += 1
        backbone = {name: tensor.detach().clone() for name, tensor in named_state(model.backbone)}
        rows = None if model.norm_statistics is None else [row.clone() for row in model.norm_statistics.rows]
        self.starts.append((backbone, rows))

    def on_step_end(self, args, state, control, **kwargs):
        self.calls["step_end"] += 1

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.calls["evaluate"] += 1

    def on_save(self, args, state, control, **kwargs):
        self.calls["save"] += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.calls["train_end"] += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def masks_on_disk(folder, model):
    """(event, route) -> masks."""
    directory = RunDirectory(folder)
    found = {}
    for file in sorted((Path(folder) / "extraction").glob("event-*/route-*.safetensors")):
        event, route = int(file.parent.name.split("-")[1]), int(file.stem.split("-")[1])
        found[event, route] = directory.load_masks(event, route, model.mask_bank.shapes)
    return found


def contents(folder):
    """What must be equal for runs to be equal: the tensors of every round and of the end, θ0, and all masks."""
    paths = [*Path(folder).glob("round-*/model.safetensors"), *Path(folder).glob("final/model.safetensors")]
    paths += [*Path(folder).glob("extraction/event-*/*.safetensors"), *Path(folder).glob("theta0.safetensors")]
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:  # the order of its metadata is not that of writing
            found[str(path.relative_to(folder))] = file.metadata(), hash_tensors(load_file(path))
    return found


def files(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a run leaves


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
        expected = figures(report["metrics"])
        assert {"eval_loss", "eval_balanced_accuracy", "eval_ant/auroc", "eval_constant_tickets"} <= expected.keys()
        assert figures(again) == expected


def figures(metrics):
    """Without what depends on the time of day, or on the training around."""
    return {key: value for key, value in metrics.items() if not key.endswith(("_second", "time", "round", "epoch"))}


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
        assert all(row.tolist() == [102, 102, 102, int(count)] for row in rows)  # batches that each route trained on


def test_the_end_is_the_last_round(finished):
    last, final = finished.folder / ROUNDS[-1], finished.folder / "final"
    names = {path.name for path in final.iterdir()}
    card = {"README.md", "similarity.png", "training_run.json"}
    assert {"config.json", "model.safetensors", "training_args.json", *card} <= names
    for name in names - card:
        assert (final / name).read_bytes() == (last / name).read_bytes()
    first = (finished.folder / ROUNDS[0] / "model.safetensors").read_bytes()
    assert first != (last / "model.safetensors").read_bytes()


def test_the_model_in_memory_is_the_saved_one(finished):
    saved = load_file(finished.folder / "final" / "model.safetensors")
    live = finished.trainer.model.state_dict()
    assert all(same(live[name], tensor) for name, tensor in saved.items())


def test_folders_hold_safetensors_json_and_a_card_alone(finished, tmp_path):
    run(tmp_path / "run", save_strategy="steps", save_steps=2)
    for folder in (finished.folder, tmp_path / "run"):
        for path in files(folder):
            is_card = path in ("final/README.md", "final/similarity.png")
            assert path.endswith((".json", ".safetensors")) or is_card or "/checkpoint-" in path, path
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
    made.args.mixed_precision = "fp16"  # refused on a processor, so not given
    ticket = made._ticket_trainer(dict(named_state(made.model.backbone)))
    assert (ticket.max_grad_norm, ticket.fp16) == (0.5, True)
    assert ticket.network is not made.model.backbone
    optimizer = ticket.make_optimizer(ticket.network)
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    assert {(group["lr"], group["betas"][0], group["fused"]) for group in groups} == {(0.25, 0.5, True)}
    assert [group["weight_decay"] for group in groups] == [0.125, 0.0]
    assert [len(group["params"]) for group in groups] == [7, 4]  # as Trainer splits them: batch norm's weights decay


def test_extraction_is_the_same_in_any_order(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "deal_out", lambda costs, world_size: [[2, 0, 1]])
    made = run(tmp_path / "run")
    assert made.model.mask_bank.fingerprint() == finished.trainer.model.mask_bank.fingerprint()
    assert contents(tmp_path / "run") == contents(finished.folder)


def test_equal_runs_are_equal_and_other_seeds_are_not(finished, tmp_path):
    run(tmp_path / "same")
    assert contents(tmp_path / "same") == contents(finished.folder)
    other = run(tmp_path / "other", seed=7, target_sparsity=[0.3])
    reports = [other.rounds[0], finished.rounds[0]]
    assert reports[0]["mask_fingerprint"] != reports[1]["mask_fingerprint"]


# Interruptions


class StopError(Exception):
    pass


class StopAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step
        self.seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen += 1
        if self.seen == self.step:
            raise StopError


class StopAtEvaluation(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_evaluate(self, args, state, control, **kwargs):
        self.number -= 1
        if self.number == 0:
            raise StopError


def stop_in(monkeypatch, name, number):
    """Raises at the `number`-th call of a method of `RTLTrainer`, or of a function that extraction uses."""
    owner = RTLTrainer if hasattr(RTLTrainer, name) else extraction
    original, calls = getattr(owner, name), Counter()

    def stopping(*positional, **keywords):
        calls["made"] += 1
        if calls["made"] == number:
            raise StopError
        return original(*positional, **keywords)

    monkeypatch.setattr(owner, name, stopping)


def interrupt(monkeypatch, folder, place, **values):
    """A run that breaks off at `place`, (what, which of them)."""
    kind, number = place
    callbacks = {"step": StopAtStep, "evaluation": StopAtEvaluation}
    with monkeypatch.context() as patched:
        if kind not in callbacks:
            stop_in(patched, kind, number)
        made = make_trainer(folder, callbacks=[callbacks[kind](number)] if kind in callbacks else [], **values)
        with pytest.raises(StopError):
            made.train()
    return made


# Place -> steps of joint retraining left to do, without and with checkpoints of every step.
PLACES = {
    ("prune", 5): (6, 6),  # in the middle of the second round's extraction
    ("step", 4): (12, 9),  # in the middle of the first joint retraining
    ("step", 9): (6, 4),  # and of the second
    ("evaluation", 2): (6, 0),
    ("_report", 1): (12, 6),  # the model is saved, but not yet the report
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_interrupted_run_is_continued_to_the_same_end(finished, tmp_path, monkeypatch, place, checkpoints):
    saving = {"save_strategy": "steps", "save_steps": 1} if checkpoints else {}
    interrupt(monkeypatch, tmp_path / "run", place, **saving)
    assert "final/model.safetensors" not in contents(tmp_path / "run")
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **saving)
    assert contents(tmp_path / "run") == contents(finished.folder)
    assert recorded.calls["step_end"] == PLACES[place][checkpoints]
    reports = [json.loads((tmp_path / "run" / name / "round.json").read_text()) for name in ROUNDS]
    for report, expected in zip(reports, finished.rounds, strict=True):
        for key in ("kept", "union", "mask_fingerprint", "steps", "started_from"):
            assert report[key] == expected[key]
        assert figures(report["metrics"]) == figures(expected["metrics"])
    steps = [entry["step"] for entry in reports[1]["log_history"] if "loss" in entry]
    assert steps == list(range(1, 13))


def test_the_same_trainer_continues_what_broke_off(finished, tmp_path, monkeypatch):
    """Its model has been trained by then; θ0 is what it was."""
    for place in (("step", 4), ("step", 9), ("_recalibrate_union", 2)):
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
        if self._active.route == -1:
            raise StopError
        return original(self, *positional, **keywords)

    monkeypatch.setattr(RTLModelForImageClassification, "forward", stopping)
    with pytest.raises(StopError):
        made.train()
    assert [module.momentum for module in norms] == momenta != []
    assert not made.model.training


def test_a_damaged_mask_is_made_again(finished, tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", ("step", 9))
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


def test_damaged_initial_weights_are_written_again(finished, tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", ("step", 4))
    (tmp_path / "run" / "theta0.safetensors").write_bytes(b"short")
    run(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished.folder)


@pytest.mark.parametrize("torn", ["no state", "half a state", "an altered optimizer", "no seal"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(finished, tmp_path, monkeypatch, torn):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    interrupt(monkeypatch, tmp_path / "run", ("step", 5), **saving)
    checkpoint = tmp_path / "run" / ROUNDS[0] / "checkpoint-4"
    state = (checkpoint / "trainer_state.json").read_text()
    if torn == "no seal":
        (checkpoint / "checkpoint.json").unlink()
    elif torn == "an altered optimizer":
        content = bytearray((checkpoint / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(content)
    else:
        (checkpoint / "trainer_state.json").write_text(state[: len(state) // 2] if torn == "half a state" else "")
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **saving)
    assert recorded.calls["step_end"] == 3 + 6
    assert contents(tmp_path / "run") == contents(finished.folder)


def test_a_failure_in_the_second_round_keeps_the_first_whole(finished, tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run", ("step", 8))
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


@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"num_train_epochs": 1.5}])
def test_a_run_that_broke_off_after_its_last_step_trains_no_more(tmp_path, monkeypatch, steps):
    """The last step is not the last of an epoch, of which Trainer would train one more."""
    options = {"target_sparsity": [0.3], "save_strategy": "steps", "save_steps": 1, **steps}
    whole = run(tmp_path / "whole", **options)
    interrupt(monkeypatch, tmp_path / "run", ("_recalibrate_union", 1), **options)
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], **options)
    assert whole.rounds[0]["steps"] == {"max_steps": 4, "num_train_epochs": 9}[next(iter(steps))]
    assert recorded.calls["step_end"] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


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
    assert recorded.calls["step_end"] == 6  # of the first round alone
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
        ({"model": image_model(norm_statistics="shared")}, "model: "),
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


def test_runs_that_differ_in_statistics_share_one_extraction(tmp_path, monkeypatch):
    shared = str(tmp_path / "masks")
    first = run(tmp_path / "per_route", extraction_dir=shared)
    monkeypatch.setattr(Extraction, "_train_and_prune", None)  # not called: all masks are there
    second = run(tmp_path / "shared", image_model(norm_statistics="shared"), extraction_dir=shared)
    assert [r["mask_fingerprint"] for r in first.rounds] == [r["mask_fingerprint"] for r in second.rounds]
    assert not (tmp_path / "shared" / "extraction").exists()
    before = files(tmp_path)
    for change in ({"seed": 1}, {"model": image_model(drop_rate=0.5)}, {"model": image_model(seed=2)}):
        with pytest.raises(ValueError, match="another configuration"):
            make_trainer(tmp_path / "third", extraction_dir=shared, **change).train()
    assert {path: content for path, content in files(tmp_path).items() if path in before} == before
    assert not (tmp_path / "third" / "run.json").exists()


# Labels tickets


def sentences(number, seed=0):
    """Tokens of two domains; the label is whether the first token is high."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(2, 30, size=(number, 6))
    return datasets.Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "domain": ["news" if index % 3 else "law" for index in range(number)],
            "label": (tokens[:, 0] > 15).astype(int).tolist(),
            "unused": ["x"] * number,
        }
    )


def text_model(**arguments):
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=2,
    )
    return RTLModelForSequenceClassification.from_backbone(
        config, route_names=["law", "news"], ticket_task="labels", seed=0, **arguments
    )


def test_a_labels_run_with_a_route_column(tmp_path):
    values = {"train": sentences(24), "evaluate": sentences(12, seed=1), "route_column": "domain"}
    made = run(tmp_path / "run", text_model(norm_statistics="shared"), **values)
    total = made.model.mask_bank.num_weights
    assert made.model.mask_bank.count().tolist() == [total - round(0.6 * total)] * 2
    assert made.plan().route_sizes == {"law": 8, "news": 16}
    metrics = made.rounds[-1]["metrics"]
    assert {"eval_law/accuracy", "eval_news/accuracy", "eval_accuracy", "eval_worst_route_accuracy"} <= metrics.keys()
    weighted = (4 * metrics["eval_law/accuracy"] + 8 * metrics["eval_news/accuracy"]) / 12
    assert metrics["eval_accuracy"] == pytest.approx(weighted)
    model = RTLModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final")
    again = make_trainer(tmp_path / "unused", model, **values).evaluate()
    assert figures(again) == figures(metrics)
    # As any user would compute it.
    data = sentences(12, seed=1)
    logits = model(input_ids=torch.tensor(data["input_ids"]), route_ids=list(data["domain"])).logits
    assert metrics["eval_accuracy"] == (logits.argmax(1) == torch.tensor(data["label"])).float().mean()
    predicted = made.predict(sentences(12, seed=1))
    assert predicted.metrics["test_accuracy"] == metrics["eval_accuracy"]


def test_shared_statistics_of_a_labels_run(tmp_path):
    columns = DOMAINS
    model = image_model(ticket_task="labels", num_labels=2, norm_statistics="shared")
    values = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
    made = run(tmp_path / "run", model, target_sparsity=[0.3], **values)
    assert made.model.norm_statistics is None
    tensors = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert not [name for name in tensors if name.startswith("norm_statistics")]
    saved = RTLModel.from_pretrained(tmp_path / "run" / "final")
    again = make_trainer(tmp_path / "unused", saved, **values).evaluate()
    assert again["eval_loss"] == made.rounds[0]["metrics"]["eval_loss"]


def test_rewinding_to_weights_after_dense_steps(tmp_path):
    columns = DOMAINS

    def make(folder, **values):
        model = image_model(ticket_task="labels", num_labels=2)
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        return make_trainer(folder, model, target_sparsity=[0.3], callbacks=[recorded], **data, **values)

    thetas = []
    for steps in (0, 2, 3):
        recorded = Recorder()
        made = make(tmp_path / str(steps), rewind_to=steps)
        made.train()
        theta0 = read_tensors(tmp_path / str(steps) / "theta0.safetensors")
        backbone, rows = recorded.starts[0]
        assert all(same(backbone[name], theta0[name]) for name in theta0)
        assert same(rows[0][1], theta0["timm_model.bn1.running_mean"])
        assert int(theta0["timm_model.bn1.num_batches_tracked"]) == steps
        thetas.append(hash_tensors(theta0))
        initial = dict(named_state(image_model(ticket_task="labels", num_labels=2).backbone))
        outside = [
            same(made.model.backbone.get_parameter(name)[~union], theta0[name][~union])
            for name, union in zip(made.model.mask_bank.weight_names, made.model.mask_bank.union(), strict=True)
        ]
        assert all(outside)
        assert (steps == 0) == all(same(theta0[name], initial[name]) for name in initial)
    assert len(set(thetas)) == 3
    recorded = Recorder()
    make(tmp_path / "again", rewind_to=3).train()
    assert hash_tensors(read_tensors(tmp_path / "again" / "theta0.safetensors")) == thetas[-1]


def test_rewinding_uses_the_threads_of_extraction(tmp_path, monkeypatch):
    columns = DOMAINS
    model = image_model(ticket_task="labels", num_labels=2)
    threads, used = 5, []
    original = TicketTrainer.step

    def set_num_threads(number):
        nonlocal threads
        threads = number

    def step(self, batch):
        used.append(threads)
        return original(self, batch)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(TicketTrainer, "step", step)
    data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
    run(tmp_path / "run", model, target_sparsity=[0.3], rewind_to=1, extraction_threads=3, **data)
    assert used == [3] * (1 + 3 * 2)
    assert threads == 5


# Options


def test_only_the_last_round_is_retrained_if_asked(finished, tmp_path):
    recorded = Recorder()
    made = run(tmp_path / "run", callbacks=[recorded], retrain_every_round=False)
    assert [report["folder"] for report in made.rounds] == [ROUNDS[1]]
    assert not (tmp_path / "run" / ROUNDS[0]).exists()
    assert recorded.calls["train_begin"] == 1
    ours, theirs = contents(tmp_path / "run"), contents(finished.folder)
    assert all(ours[path] == theirs[path] for path in ours)


@pytest.mark.parametrize("scope", ["layer", "global_normalised"])
def test_scopes_of_pruning(finished, tmp_path, scope):
    bank = run(tmp_path / "run", prune_scope=scope, target_sparsity=[0.3]).model.mask_bank
    assert bank.count().tolist() == [bank.num_weights - round(0.3 * bank.num_weights)] * 3
    shares = bank.density(per_layer=True)
    if scope == "layer":
        assert torch.allclose(shares, torch.tensor(0.7, dtype=torch.float64), atol=0.01)
    assert bank.fingerprint() != finished.rounds[0]["mask_fingerprint"]


def test_a_single_route_is_plain_iterative_pruning(tmp_path):
    data = Images(24, columns=DOMAINS, num_routes=1)
    model = image_model(routes=["all"], ticket_task="labels", num_labels=2)
    made = run(tmp_path / "run", model, train=data, evaluate=data, route_column="domain")
    assert [report["mean_similarity"] for report in made.rounds] == [None, None]
    assert made.rounds[-1]["union"] == made.rounds[-1]["core"] == made.rounds[-1]["kept"]["all"]


def test_membership_of_a_column_that_is_no_label(tmp_path):
    """The data's own labels play no part."""
    made = []
    for columns in (DOMAINS, DOMAINS[::2]):
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        made.append(run(tmp_path / str(len(columns)), **data))
    assert figures(made[0].rounds[-1]["metrics"]) == figures(made[1].rounds[-1]["metrics"])
    assert "eval_ant/auroc" in made[0].rounds[-1]["metrics"]


def test_workers_that_fetch_data_change_nothing(finished, tmp_path):
    run(tmp_path / "run", dataloader_num_workers=1, target_sparsity=[0.3])
    ours, theirs = contents(tmp_path / "run"), contents(finished.folder)
    name = f"{ROUNDS[0]}/model.safetensors"
    assert ours[name] == theirs[name]


def test_the_learning_rate_follows_its_schedule_anew_in_every_round(tmp_path):
    recorded = Recorder()
    run(tmp_path / "run", callbacks=[recorded], lr_scheduler_type="linear")
    rates = [logs["learning_rate"] for _, logs in recorded.logs if "learning_rate" in logs]
    assert len(rates) == 12
    assert rates[:6] == rates[6:]
    assert rates[0] == max(rates) > 4 * min(rates)


def test_every_round_has_a_fresh_optimizer(tmp_path, monkeypatch):
    made = []
    original = RTLTrainer.create_optimizer

    def create(self, model=None):
        assert self.optimizer is None
        optimizer = original(self, model)
        made.append((optimizer, len(optimizer.state)))
        return optimizer

    monkeypatch.setattr(RTLTrainer, "create_optimizer", create)
    run(tmp_path / "run")
    (first, first_state), (second, second_state) = made
    assert first is not second
    assert first_state == second_state == 0
    assert isinstance(first, MaskedAdamW)


@pytest.mark.parametrize(
    ("optim", "optimizer_class"),
    [
        ("sgd", MaskedSGD),
        ("adamw_torch", MaskedAdamW),
        ("adamw_torch_fused", MaskedAdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_updates_are_masked_whatever_the_optimizer(tmp_path, optim, optimizer_class):
    class Watch(TrainerCallback):
        steps = 0

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.routes_since_update.update(range(3))  # as a step that a scaler skipped leaves behind

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.weights = [bits(weight).clone() for weight in model.masker.weights]
            (self.route,) = model.routes_since_update
            inner = optimizer.optimizer
            assert type(inner) is optimizer_class
            assert {group["weight_decay"] for group in inner.param_groups} == {0.1, 0.0}

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            masks = [mask.flatten().repeat_interleave(4) for mask in model.mask_bank[self.route]]
            moved = [bits(weight) != old for weight, old in zip(model.masker.weights, self.weights, strict=True)]
            assert not any((changed & ~mask).any() for changed, mask in zip(moved, masks, strict=True))
            assert all(changed.any() for changed in moved)
            self.steps += 1

    watch = Watch()
    options = {"target_sparsity": [0.3], "weight_decay": 0.1, "max_grad_norm": 1.0, "learning_rate": 0.01}
    run(tmp_path / "run", callbacks=[watch], optim=optim, **options)
    assert watch.steps == 6


def test_one_update_is_one_route_with_accumulation(tmp_path, monkeypatch):
    seen = []
    step, training_step = MaskedAdamW.step, RTLTrainer.training_step

    def watched_step(self, closure=None):
        seen.append(("step", sorted(self._model.routes_since_update)))
        return step(self, closure)

    def watched_training_step(self, model, inputs, num_items_in_batch=None):
        seen.append(("batch", inputs["route"], len(inputs["labels"])))
        return training_step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(MaskedAdamW, "step", watched_step)
    monkeypatch.setattr(RTLTrainer, "training_step", watched_training_step)
    made = run(tmp_path / "run", target_sparsity=[0.3], gradient_accumulation_steps=2, num_train_epochs=2)
    assert made.plan().retraining_steps == made.state.global_step == 6
    expected = [[("batch", route, 8), ("batch", route, 8), ("step", [route])] for route in (0, 1, 2)]
    assert seen == list(chain(*expected)) * 2


def test_accumulated_batches_weigh_as_one(tmp_path):
    """Without batch norm, two batches of 4 are one of 8: the loss and its gradient are means over all of them."""
    columns = DOMAINS
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    results = []
    for size, accumulation in ((4, 2), (8, 1)):
        model = RTLModelForImageClassification.from_backbone(config, route_names=ROUTES, ticket_task="labels", seed=0)
        data = {"train": Images(24, columns=columns), "evaluate": Images(12, 1, columns), "route_column": "domain"}
        made = run(
            tmp_path / str(size),
            model,
            optim="sgd",
            learning_rate=0.1,
            target_sparsity=[0.0],
            route_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            **data,
        )
        assert made.state.global_step == 6
        losses = [entry["loss"] for entry in made.rounds[0]["log_history"] if "loss" in entry]
        results.append((losses, [parameter.detach() for parameter in made.model.parameters()]))
    (losses, parameters), (other_losses, other_parameters) = results
    assert losses == pytest.approx(other_losses, rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(parameters, other_parameters, strict=True))


def test_both_phases_compute_in_bfloat16(tmp_path, monkeypatch):
    computed = set()
    original = nn.Conv2d.forward

    def forward(self, x):
        y = original(self, x)
        computed.add((phase, y.dtype))
        return y

    phase = "extraction"

    class Phase(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            nonlocal phase
            phase = "retraining"

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    made = run(tmp_path / "run", callbacks=[Phase()], bf16=True, target_sparsity=[0.3])
    assert computed == {("extraction", torch.bfloat16), ("retraining", torch.bfloat16)}
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert np.isfinite(made.rounds[0]["train_loss"])
    total = made.model.mask_bank.num_weights
    assert made.model.mask_bank.count().tolist() == [total - round(0.3 * total)] * 3


def test_the_best_checkpoint_of_a_round_is_its_model(tmp_path):
    """Scripted so that the best evaluations are the second of the first round and the first of the second."""
    scores = iter([0.2, 0.9, 0.1, 0.5, 0.8, 0.3, 0.1, 0.4])

    def compute_metrics(prediction):
        assert prediction.predictions.shape == (12, 3)
        assert prediction.label_ids.tolist() == [index % 3 for index in range(12)]
        return {"balanced_accuracy": next(scores)}

    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            backbone = {name: tensor.detach().clone() for name, tensor in model.backbone.named_parameters()}
            kept[metrics["eval_balanced_accuracy"]] = backbone, [row[:3].clone() for row in model.norm_statistics.rows]

    made = run(
        tmp_path / "run",
        callbacks=[Keep()],
        options={"compute_metrics": compute_metrics},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="balanced_accuracy",
    )
    assert next(scores, None) is None
    assert [report["metrics"]["eval_balanced_accuracy"] for report in made.rounds] == [0.5, 0.4]
    for name, best in zip(ROUNDS, (0.9, 0.8), strict=True):
        model = RTLModel.from_pretrained(tmp_path / "run" / name)
        parameters, rows = kept[best]
        assert all(same(model.backbone.get_parameter(key), value) for key, value in parameters.items())
        assert all(same(row[:3], old) for row, old in zip(model.norm_statistics.rows, rows, strict=True))


def test_the_best_is_found_by_our_own_metrics(tmp_path):
    made = run(
        tmp_path / "run",
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="balanced_accuracy",
    )
    for report in made.rounds:
        history = [entry for entry in report["log_history"] if entry.get("round") == report["round"]]
        values = [entry["eval_balanced_accuracy"] for entry in history if "eval_balanced_accuracy" in entry]
        assert len(values) == 3
        assert report["metrics"]["eval_balanced_accuracy"] == max(values[:2])


def test_several_evaluation_sets(tmp_path):
    sets = {"easy": Images(12, seed=1), "hard": Images(9, seed=2)}
    made = run(tmp_path / "run", evaluate=sets, target_sparsity=[0.3])
    metrics = made.rounds[0]["metrics"]
    for name, data in sets.items():
        alone = made.evaluate(data)
        for key in ("loss", "balanced_accuracy", "bee/auroc"):
            assert metrics[f"eval_{name}_{key}"] == alone[f"eval_{key}"]


def test_a_run_without_evaluation(tmp_path):
    made = RTLTrainer(image_model(), arguments(tmp_path, target_sparsity=[0.3]), train_dataset=Images(24))
    made.train()
    assert made.rounds[0]["metrics"] == {}
    with pytest.raises(ValueError, match="`eval_dataset`"):
        made.evaluate()


# Calibration


def test_samples_held_out_for_calibration_are_not_trained_on(tmp_path, monkeypatch):
    data = Images(36)
    made = make_trainer(tmp_path / "run", train=data, calibration_fraction=0.25, seed=1)
    held_out = sorted(made.calibration_dataset.indices)
    assert 0 not in held_out  # that sample is looked at for its columns
    assert [index % 3 for index in held_out].count(0) == [index % 3 for index in held_out].count(2) == 3
    assert len(held_out) == 9
    monkeypatch.setattr(RTLTrainer, "_calibrated_thresholds", lambda self: None)
    data.fetched.clear()
    made.train()
    assert set(data.fetched) == set(range(36)) - set(held_out)
    assert made.plan().route_sizes == dict.fromkeys(ROUTES, 9)


def test_thresholds_are_calibrated_in_every_round_stored_and_loaded(tmp_path):
    values = {"train": Images(36), "calibration_fraction": 0.25}
    made = run(tmp_path / "run", **values)
    assert made.rounds[0]["thresholds"] != made.rounds[1]["thresholds"]
    for name, report in zip(ROUNDS, made.rounds, strict=True):
        model = RTLModelForImageClassification.from_pretrained(tmp_path / "run" / name)
        assert model.config.thresholds == report["thresholds"]
        pixels = torch.stack([made.calibration_dataset[index]["pixel_values"] for index in range(9)])
        homes = np.array([made.calibration_dataset[index]["label"] for index in range(9)])
        with torch.no_grad():
            scores = torch.cat([model(pixel_values=part).logits for part in pixels.split(8)])
        assert model.config.thresholds == calibrate_thresholds(scores.numpy(), homes)
        assert "eval_calibrated_balanced_accuracy" in report["metrics"]
        again = make_trainer(tmp_path / "unused", model, **values).evaluate()
        assert again["eval_calibrated_f1"] == report["metrics"]["eval_calibrated_f1"]
    reread = make_trainer(tmp_path / "run", **values)
    reread.train()
    assert reread.model.config.thresholds == made.rounds[-1]["thresholds"]


def test_thresholds_of_one_round_are_not_those_of_the_next(tmp_path):
    class Watch(Recorder):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            assert model.config.thresholds is None
            self.calls["train_begin"] += 1

    watch = Watch()
    run(tmp_path / "run", callbacks=[watch], train=Images(36), calibration_fraction=0.25)
    assert watch.calls["train_begin"] == 2


def test_a_calibration_set_of_its_own(tmp_path):
    calibration = Images(9, seed=5)
    made = run(tmp_path / "run", target_sparsity=[0.3], options={"calibration_dataset": calibration})
    assert len(made.rounds[0]["thresholds"]) == 3
    assert len(made.route_data.dataset) == 24
    with pytest.raises(ValueError, match="`calibration_dataset` and `calibration_fraction`"):
        make_trainer(tmp_path / "b", calibration_fraction=0.2, options={"calibration_dataset": calibration})


def test_held_out_samples_keep_their_route_where_classes_are_ordered_otherwise(tmp_path):
    """Classes are matched to routes by name, so a class's number need not be its route's."""
    classes = ["cat", "ant", "bee"]
    source = Images(36)
    data = datasets.Dataset.from_dict(
        {
            "pixel_values": [sample["pixel_values"].tolist() for sample in source.samples],
            "label": [classes.index(ROUTES[sample["label"]]) for sample in source.samples],
        },
        features=datasets.Features(
            {
                "pixel_values": datasets.Array3D((3, 16, 16), "float32"),
                "label": datasets.ClassLabel(names=classes),
            }
        ),
    ).with_format("torch")
    results = []
    for train in (source, data):
        made = make_trainer(
            tmp_path / str(len(results)), train=train, calibration_fraction=0.25, target_sparsity=[0.3]
        )
        loader = made.get_eval_dataloader(made.calibration_dataset)
        labels = list(chain(*(batch["labels"].tolist() for batch in loader)))
        assert labels == [index % 3 for index in made.calibration_dataset.indices]
        made.train()
        results.append(made.rounds[0]["thresholds"])
    assert results[0] == results[1]


# Bad input


class Broken(Images):
    """`Images` with a change to its samples."""

    def __init__(self, number, change, **values):
        super().__init__(number, **values)
        self.samples = [change(index, sample) for index, sample in enumerate(self.samples)]


def without(name):
    return lambda index, sample: {key: value for key, value in sample.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route_column": "colour"}, "'colour'.*'pixel_values', 'label'"),
        ({"train": Broken(24, without("label"))}, "label"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": -1})}, "-1"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": 0.5})}, "0.5"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": 3})}, "3"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": i % 2})}, "'cat' has no samples"),
        ({"train": Broken(25, lambda i, sample: {**sample, "label": 2 if i == 0 else i % 2})}, "'cat' has a single"),
        ({"train": Broken(24, lambda i, sample: {**sample, "label": "cow"})}, "'cow'"),
        ({"train": Broken(24, lambda i, sample: list(sample))}, "list"),
        ({"train": []}, "empty"),
        ({"train": iter([])}, "map-style|iterator"),
        ({"train": {"train": Images(24)}}, "'train'"),
        ({"evaluate": Broken(12, without("label"))}, "label"),
        ({"evaluate": {"a": Images(12), "b": Broken(12, without("label"))}}, "label"),
        ({"evaluate": Broken(12, lambda i, sample: {**sample, "label": 3})}, "3"),
        ({"options": {"calibration_dataset": Broken(12, without("label"))}}, "label"),
        ({"rewind_to": 3}, "`rewind_to` = 3.*'is this mine"),
        ({"route_batch_size": 7}, "`route_batch_size` = 7 must be a multiple of 2"),
        (
            {"calibration_fraction": 0.01},
            "`calibration_fraction` = 0.01 leaves 0 of the 8 samples of route 'ant' to cal",
        ),
        ({"calibration_fraction": 0.9}, "`calibration_fraction` = 0.9 leaves 7 of the 8.* and 1 to train on"),
        ({"options": {"model_init": lambda: None}}, "`model_init`"),
        ({"options": {"optimizers": (torch.optim.SGD([torch.ones(1)]), None)}}, "`optimizers`"),
        ({"target_sparsity": [1.0]}, "below 1"),
        ({"target_sparsity": [0.99999]}, "keeps none"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size`.*`route_batch_size`"),
        ({"labels": True}, "`route_column`"),
        (
            {"labels": True, "route_column": "domain", "train": Images(24, columns=("pixel_values", "domain"))},
            "no column 'label'",
        ),
        (
            {
                "labels": True,
                "route_column": "domain",
                "train": Broken(24, lambda i, sample: {**sample, "labels": i % 3}, columns=DOMAINS),
            },
            "single label",
        ),
        ({"model": nn.Linear(2, 2)}, "RTLModel.*Linear"),
        ({"model": "test_resnet"}, "RTLModel.*str"),
        ({"args": transformers.TrainingArguments}, "RTLTrainingArguments.*TrainingArguments"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, change, message):
    change = dict(change)
    if change.pop("labels", False):
        change["model"] = image_model(ticket_task="labels", num_labels=2)
        change.setdefault("train", Images(24, columns=DOMAINS))
        change.setdefault("evaluate", Images(12, columns=DOMAINS))
    args_class = change.pop("args", None)
    with pytest.raises((TypeError, ValueError), match=message):
        if args_class is not None:
            args = args_class(output_dir=str(tmp_path / "run"), use_cpu=True)
            RTLTrainer(image_model(), args, train_dataset=Images(24))
        else:
            make_trainer(tmp_path / "run", **change).train()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_route_without_negatives_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two routes"):
        image_model(routes=["one"])
    with pytest.raises(ValueError, match="'bee' has no samples"):
        make_trainer(tmp_path / "run", image_model(routes=["ant", "bee"]), train=Images(24, num_routes=1))
    assert list(tmp_path.iterdir()) == []


def test_training_needs_data(tmp_path):
    made = RTLTrainer(image_model(), arguments(tmp_path / "run"), eval_dataset=Images(12))
    assert "eval_balanced_accuracy" in made.evaluate()
    with pytest.raises(ValueError, match="`train_dataset`"):
        made.train()


def test_processes_that_are_not_connected_are_refused(tmp_path, monkeypatch):
    """As torch's launcher starts them on CPUs if the arguments do not say `use_cpu`."""
    args = arguments(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but they are not connected.*`use_cpu=True`"):
        RTLTrainer(image_model(), args, train_dataset=Images(24))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_splits_weights_is_refused(tmp_path, monkeypatch, name):
    args = arguments(tmp_path / "run")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported: it splits weights.*data parallelism"):
        RTLTrainer(image_model(), args, train_dataset=Images(24))
    assert not (tmp_path / "run").exists()


def test_several_accelerators_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(RTLTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs.*torchrun --nproc_per_node=2"):
        make_trainer(tmp_path / "run")


def test_labels_that_are_no_classes_are_not_checked(tmp_path):
    """Numbers to regress, of less than 1, and several labels a sample."""
    for label in (lambda i: i / 100, lambda i: torch.tensor([1.0, 0.0])):
        data = Broken(24, lambda i, sample, label=label: {**sample, "labels": label(i)}, columns=DOMAINS)
        model = image_model(ticket_task="labels", num_labels=2)
        made = RTLTrainer(model, arguments(tmp_path / "run", route_column="domain"), train_dataset=data)
        assert made.plan().route_sizes == dict.fromkeys(ROUTES, 8)


def test_a_loss_that_is_not_a_number_stops_extraction(tmp_path):
    data = Broken(24, lambda i, sample: {**sample, "pixel_values": sample["pixel_values"] / (i != 4)})
    with pytest.raises(
        FloatingPointError,
        match="extraction of route 'ant', prune event 0: the loss became nan",
    ):
        run(tmp_path / "run", train=data, extraction_steps=8)
    assert not list((tmp_path / "run").rglob("route-*.safetensors"))


def test_a_loss_that_is_not_a_number_stops_joint_retraining(tmp_path, monkeypatch):
    compute_loss = RTLTrainer.compute_loss

    def nan_in_retraining(self, model, *positional, **keywords):
        loss = compute_loss(self, model, *positional, **keywords)
        return loss * float("nan") if isinstance(model, RTLModel) and model.training else loss

    monkeypatch.setattr(RTLTrainer, "compute_loss", nan_in_retraining)
    for evaluate in (Images(12), None):
        made = RTLTrainer(
            image_model(), arguments(tmp_path, target_sparsity=[0.3]), train_dataset=Images(24), eval_dataset=evaluate
        )
        with pytest.raises(
            FloatingPointError,
            match=f"joint retraining of {ROUNDS[0]}: the loss or a weight became NaN.*mean loss nan",
        ):
            made.train()
    assert not list(tmp_path.rglob("model.safetensors"))


def test_pruning_that_cuts_a_ticket_apart_raises_unless_allowed(tmp_path, caplog):
    tight = {"target_sparsity": [0.995], "prune_amount": 0.9, "extraction_steps": 1}
    with pytest.raises(
        FloatingPointError, match="has cut the output of ticket 'ant' from its input.*allow_disconnected"
    ):
        run(tmp_path / "refused", **tight)
    with caplog.at_level(logging.WARNING, logger="hf_rtl.trainer"):
        made = run(tmp_path / "allowed", allow_disconnected=True, **{**tight, "target_sparsity": [0.99, 0.995]})
    assert sum("emptied whole layers" in record.message for record in caplog.records) == 1
    report = made.rounds[-1]
    assert report["emptied_layers"]["ant"]
    assert report["metrics"]["eval_constant_tickets"] == 3
    bank = made.model.mask_bank
    for name, layers in report["emptied_layers"].items():
        counts = dict(zip(bank.weight_names, [int(mask.sum()) for mask in bank[name]], strict=True))
        assert layers == [layer for layer, count in counts.items() if count == 0]


# Controls


def test_retraining_given_masks(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    made = make_trainer(folder)
    made.train()
    tickets = [made.model.mask_bank[route] for route in ROUTES]
    before = files(folder)
    # The tickets' own masks give the round once more.
    report = made.retrain(tickets, like=ROUNDS[1], name="copy")
    copied = load_file(folder / "copy" / "model.safetensors")
    expected = load_file(folder / ROUNDS[1] / "model.safetensors")
    assert all(same(copied[name], tensor) for name, tensor in expected.items())
    assert report["mask_fingerprint"] == made.rounds[1]["mask_fingerprint"]
    assert len(made.rounds) == 2
    # Others give another model.
    shifted = tickets[1:] + tickets[:1]
    report = made.retrain(shifted, like=ROUNDS[1], name="shifted")
    assert report["mask_fingerprint"] == made.model.mask_bank.fingerprint() != made.rounds[1]["mask_fingerprint"]
    assert report["folder"] == "shifted"
    assert json.loads((folder / "shifted" / "round.json").read_text()) == report
    # Read back, and not confused with a model of other masks.
    assert made.retrain(shifted, like=ROUNDS[1], name="shifted") == report
    for name in ("copy", ROUNDS[1]):
        with pytest.raises(ValueError, match="other masks"):
            made.retrain(shifted, like=ROUNDS[1], name=name)
    with pytest.raises(ValueError, match="'round-9' is no round"):
        made.retrain(tickets, like="round-9", name="x")
    after = files(folder)
    assert {path: after[path] for path in before} == before


def test_the_batches_of_a_round_can_be_had_again(tmp_path, monkeypatch):
    trained = []
    training_step = RTLTrainer.training_step

    def watched(self, model, inputs, num_items_in_batch=None):
        trained.append(copy.copy(inputs))
        return training_step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(RTLTrainer, "training_step", watched)
    made = run(tmp_path / "run", num_train_epochs=2)
    for index in range(2):
        again = list(made.retraining_batches(index))
        batches = trained[index * 12 : (index + 1) * 12]
        assert [batch["route"] for batch in again] == [batch["route"] for batch in batches]
        for one, other in zip(again, batches, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])


def test_plain_tensors_need_no_datasets(tmp_path):
    program = """
        import sys

        class Hide:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.split(".")[0] == "datasets" else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
        try:
            import datasets
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("datasets is there")
        import torch
        import hf_rtl
        import hf_rtl.trainer

        torch.set_num_threads(1)
        samples = [{"pixel_values": torch.randn(3, 16, 16), "label": index % 2} for index in range(16)]
        model = hf_rtl.RTLModelForImageClassification.from_backbone(
            "test_resnet", route_names=["a", "b"], ticket_task="membership", seed=0
        )
        args = hf_rtl.RTLTrainingArguments(
            output_dir=sys.argv[1], target_sparsity=[0.3], extraction_steps=1, max_steps=2, route_batch_size=8,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", calibration_fraction=0.25,
        )
        trainer = hf_rtl.RTLTrainer(model, args, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        assert "datasets" not in sys.modules
        print("kept", trainer.rounds[0]["kept"]["a"])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert "kept" in result.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
