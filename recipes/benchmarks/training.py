"""Training: whole runs against `Trainer` and bare PyTorch steps, and single steps against dense ones."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_rtl import MaskedAdamW, RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state

from .cases import Case, with_random_masks
from .timing import compare, difference, in_turn


@dataclass(frozen=True)
class Run:
    """
    A training of two lengths, whose difference is free of what a run costs by itself.

    Args:
        case (`Case`): what is trained, on batches of that shape.
        steps (`int`): steps of extraction for each route in the short run, which retrains for as many for each route
            again. The long run has twice as many.
        aim (`float`): the ratio to `Trainer`.
    """

    case: Case
    steps: int
    aim: float


RUNS = (
    Run(Case("test_resnet, 32 images of 16 px", "test_resnet", (32, 3, 16, 16)), 16, 1.15),
    Run(Case("ghostnet_rtl, 64 images of 32 px", "ghostnet_rtl", (64, 3, 32, 32)), 3, 1.10),
    Run(Case("ghostnet_rtl, 320 images of 32 px", "ghostnet_rtl", (320, 3, 32, 32)), 1, 1.05),
)
NUM_ROUTES, NUM_SAMPLES = 3, 960

STEPS = (
    Case("ResNet-18, 64 images of 64 px", "resnet18", (64, 3, 64, 64)),
    Case("ViT-tiny, 32 images of 64 px", "vit_tiny_patch16_224", (32, 3, 64, 64), {"img_size": 64}),
)
# The share of zeros -> the ratio of a step of joint retraining to a dense one.
STEP_AIMS = {0.5: 1.05, 0.9: 1.02}
SETTINGS = {
    "learning_rate": 1e-4,
    "logging_steps": 500,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def measure(turns: int) -> dict[str, Any]:
    """The tables `figures` and `constant_cost`."""
    lines, constant = [], []
    for run in RUNS:
        found, own = whole_run(run, turns)
        lines += found
        constant.append(own)
    lines += [line for case in STEPS for line in single_steps(case, turns)]
    return {"figures": lines, "constant_cost": constant}


def whole_run(run: Run, turns: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same steps by `RTLTrainer`, by `Trainer` and by bare PyTorch; and what a run of each costs by itself."""
    samples, short = Samples(run.case.shape), 2 * NUM_ROUTES * run.steps
    bare = dense_step(run.case.model(1).backbone, run.case.inputs())
    steps: dict[str, Callable[[], object]] = {
        "ours, short": lambda: routed_run(run.case, samples, short),
        "Trainer, short": lambda: plain_run(run.case, samples, short),
        "bare": lambda: [bare() for _ in range(short)],
    }
    in_turn(steps, 1, warm_up=False)
    steps["ours, long"] = lambda: routed_run(run.case, samples, 2 * short)
    steps["Trainer, long"] = lambda: plain_run(run.case, samples, 2 * short)
    times = in_turn(steps, turns, warm_up=False)
    kinds = {kind: difference(times[f"{kind}, long"], times[f"{kind}, short"]) for kind in ("ours", "Trainer")}
    name = f"training, {short} steps: {run.case.name}"
    constant = {
        kind: statistics.median(times[f"{kind}, short"].process) - statistics.median(of_steps.process)
        for kind, of_steps in kinds.items()
    }
    return [
        compare(name, kinds["ours"], "Trainer", kinds["Trainer"], aim=run.aim),
        compare(name, kinds["ours"], "bare steps", times["bare"]),
        compare(f"Trainer itself, {short} steps: {run.case.name}", kinds["Trainer"], "bare steps", times["bare"]),
    ], {"network": run.case.name, "ours (s)": constant["ours"], "Trainer (s)": constant["Trainer"]}


class Samples(Dataset):
    """Random images with labels and routes. `with_routes`: whether a sample says its route."""

    def __init__(self, shape: tuple[int, ...], with_routes: bool = True) -> None:
        self.images = torch.randn((NUM_SAMPLES, *shape[1:]), generator=torch.Generator().manual_seed(0))
        self.with_routes = with_routes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"pixel_values": self.images[index], "labels": index % 2}
        return {**sample, "route": index // 7 % NUM_ROUTES} if self.with_routes else sample


def routed_run(case: Case, samples: Samples, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        routed_trainer(case, samples, number, folder).train()


def routed_trainer(case: Case, samples: Samples, number: int, folder: str, **options: Any) -> RTLTrainer:
    """A training of `number` steps: half of them extract the tickets of all routes, one prune event each."""
    args = RTLTrainingArguments(
        output_dir=folder,
        target_sparsity=[0.5],
        prune_amount=0.99,
        extraction_steps=number // 2 // NUM_ROUTES,
        max_steps=number // 2,
        route_batch_size=case.shape[0],
        route_column="route",
        **{**SETTINGS, **options},
    )
    trainer = RTLTrainer(case.model(NUM_ROUTES), args, train_dataset=samples)
    trainer.remove_callback(PrinterCallback)
    return trainer


def plain_run(case: Case, samples: Samples, number: int) -> None:
    """Trains the plain network by `Trainer`."""
    plain = copy.copy(samples)
    plain.with_routes = False
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=number, per_device_train_batch_size=case.shape[0], **SETTINGS
        )
        trainer = Trainer(model=case.model(1).backbone, args=args, train_dataset=plain)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def single_steps(case: Case, turns: int) -> list[dict[str, Any]]:
    """Steps of joint retraining and of extraction against dense ones, for tickets of several sparsities."""
    inputs = {**case.inputs(), "labels": torch.arange(case.shape[0]) % 2}
    steps = {"dense": dense_step(case.model(1).backbone, inputs)}
    for sparsity in STEP_AIMS:
        model = with_random_masks(case.model(NUM_ROUTES), 1 - sparsity).train()
        steps[f"joint {sparsity}"] = retraining_step(model, inputs)
        steps[f"extraction {sparsity}"] = extraction_step(copy.deepcopy(model), inputs)
    times = in_turn(steps, turns)
    lines = []
    for sparsity, limit in STEP_AIMS.items():
        for kind, aim in (("joint", limit), ("extraction", None)):
            name = f"{kind} step, {sparsity:.0%} zeros: {case.name}"
            lines.append(compare(name, times[f"{kind} {sparsity}"], "dense step", times["dense"], aim=aim))
    return [*lines, update_alone(case, turns)]


def update_alone(case: Case, turns: int) -> dict[str, Any]:
    """The update of a joint step, without forward and backward, against that of a dense step."""
    inputs = {**case.inputs(), "labels": torch.arange(case.shape[0]) % 2}
    model = with_random_masks(case.model(NUM_ROUTES), 0.5).train()
    masked, dense = MaskedAdamW(model.parameters(), model, lr=1e-4), make_optimizer(model)
    with model.route_context(0):
        model(**inputs).loss.backward()

    def update() -> None:
        model.routes_since_update.add(0)
        masked.step()

    times = in_turn({"masked": update, "dense": dense.step}, turns)
    return compare(f"update alone, 50% zeros: {case.name}", times["masked"], "fused AdamW", times["dense"])


def dense_step(network: torch.nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """The floor: forward, backward and fused AdamW."""
    network.train()
    optimizer = make_optimizer(network)
    labels = inputs.get("labels", torch.arange(len(next(iter(inputs.values())))) % 2)
    given = {name: value for name, value in inputs.items() if name != "labels"}

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(network(**given).logits, labels).backward()
        optimizer.step()

    return step


def retraining_step(model: RTLModel, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """A step of the paper's Algorithm 2, for the next route at each call."""
    optimizer = MaskedAdamW(model.parameters(), model, lr=1e-4)
    routes = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        with model.route_context(next(routes) % model.num_routes):
            model(**inputs).loss.backward()
        optimizer.step()

    return step


def extraction_step(model: RTLModel, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """A step of the paper's Algorithm 1, on the backbone, whose pruned weights become zero."""
    theta0 = {name: tensor.detach().clone() for name, tensor in named_state(model.backbone)}
    trainer = TicketTrainer(
        model.backbone,
        theta0,
        model.mask_bank.weight_names,
        make_optimizer,
        lambda network, batch: network(**batch).loss,
    )
    trainer.begin(model.mask_bank[0])

    def step() -> None:
        trainer.step(inputs)

    return step


def make_optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
