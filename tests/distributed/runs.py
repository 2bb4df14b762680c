"""The functions that the processes of the distributed tests run; the server that forks them imports this module."""

from __future__ import annotations

import errno
import os
import resource
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import PartialState  # noqa: E402
from timm.models import create_model  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import TrainerCallback, ViTConfig  # noqa: E402

import hf_rtl.training.callbacks  # noqa: E402
import hf_rtl.training.processes  # noqa: E402
from hf_rtl import (  # noqa: E402
    CollapseMonitor,
    RTLModelForImageClassification,
    RTLTrainer,
    RTLTrainingArguments,
    find_tickets,
)
from hf_rtl.analysis import Change  # noqa: E402
from hf_rtl.training import route_trainer  # noqa: E402
from hf_rtl.training.extraction import Extraction  # noqa: E402
from hf_rtl.training.one_pass import gather_in_order  # noqa: E402
from hf_rtl.training.processes import Processes  # noqa: E402
from hf_rtl.training.running_statistics import running_statistics  # noqa: E402
from hf_rtl.training.ticket_trainer import TicketTrainer  # noqa: E402
from tests.training.small_runs import SMALL_NET  # noqa: E402


torch.set_num_threads(1)

ROUTES = ["ant", "bee", "cat"]
_ = create_model  # loads timm's models before the fork


class Images(Dataset):
    """
    Images of 16 x 16 whose colour shows the route, with noise that torch's global generator draws at every fetch.

    Args:
        number (`int`): the number of images.
        sizes (`list[int]`, *optional*): images per route; by default routes take turns.
        noise (`float`): the scale of the noise.
        dtype (`torch.dtype`): the type of the images.
    """

    def __init__(
        self,
        number: int = 24,
        *,
        sizes: list[int] | None = None,
        noise: float = 0.2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        if sizes is None:
            self.labels = [index % 3 for index in range(number)]
        else:
            self.labels = [route for route, size in enumerate(sizes) for _ in range(size)]
        self.images = torch.randn(len(self.labels), 3, 16, 16, generator=generator, dtype=dtype)
        for index, label in enumerate(self.labels):
            self.images[index, label] += 1
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"pixel_values": image + self.noise * torch.randn_like(image), "label": self.labels[index]}


class Domains(Images):
    """`Images` whose colour shows the domain, and whose label is independent of it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "domain": sample["label"], "label": index // 3 % 2}


def make_model(kind: str, **options: Any) -> RTLModelForImageClassification:
    """
    A small or larger network with batch norm (`"timm"`, `"resnet"`) or a transformer (`"vit"`), with three membership
    routes.
    """
    backbone: Any = {"timm": SMALL_NET, "resnet": "test_resnet"}.get(kind)
    if kind == "vit":
        backbone = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    return RTLModelForImageClassification.from_backbone(
        backbone, route_names=ROUTES, ticket_task="membership", seed=0, **options
    )


def make_trainer(
    folder: str | Path,
    kind: str = "timm",
    *,
    data: Dataset | None = None,
    model: Any = None,
    model_options: dict[str, Any] | None = None,
    card: bool = False,
    **options: Any,
) -> RTLTrainer:
    """A trainer for small data. Without `card` its runs write no model card, which takes longer than a round."""
    settings = {
        "target_sparsity": [0.3, 0.6],
        "prune_amount": 0.3,
        "extraction_steps": 2,
        "max_steps": 6,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "route_batch_size": 12,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
    }
    args = RTLTrainingArguments(output_dir=str(folder), **{**settings, **options})
    trainer = RTLTrainer(
        make_model(kind, **(model_options or {})) if model is None else model,
        args,
        train_dataset=Images() if data is None else data,
        eval_dataset=Images(12, noise=0.0),
    )
    if not card:
        trainer.create_model_card = lambda: None
    return trainer


def summary(trainer: RTLTrainer) -> dict[str, Any]:
    """The state of a process at its end, and the real number of processes."""
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "rank": trainer.args.process_index,
        "fingerprint": trainer.model.mask_bank.fingerprint(),
        "state": {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()},
        "metrics": trainer.rounds[-1]["metrics"],
    }


def train(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(folder, kind, **options)
    trainer.train()
    return summary(trainer)


def evaluate_and_train(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(folder, kind, **options)
    trainer.evaluate()
    trainer.train()
    return summary(trainer)


def train_watched(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, with the samples and moved weights of every joint update, and the settings of DDP."""
    trainer = make_trainer(folder, kind, **options)
    original_step, original_average = trainer.training_step, route_trainer.average_over_processes
    batches: list[dict[str, Any]] = []
    moved_outside: list[int] = []
    statistics: list[tuple[list, list, list]] = []
    wrapped: dict[str, Any] = {}
    weights: list[torch.Tensor] = []

    def training_step(model, inputs, num_items_in_batch=None):
        batches.append(
            {
                "route": inputs["route"],
                "labels": inputs["labels"].tolist(),
                "sums": [round(float(image.double().sum()), 4) for image in inputs["pixel_values"]],
            }
        )
        model_in_ddp = getattr(model, "_orig_mod", model)
        if isinstance(model_in_ddp, torch.nn.parallel.DistributedDataParallel):
            names = {id(buffer): name for name, buffer in trainer.model.named_buffers()}
            wrapped["find_unused"] = model_in_ddp.find_unused_parameters
            wrapped["broadcast"] = [names[id(buffer)] for buffer in model_in_ddp.modules_buffers]
        return original_step(model, inputs, num_items_in_batch)

    def average(rows, accelerator):
        route = batches[-1]["route"]
        other_routes = [other for other in range(trainer.model.num_routes) if other != route]
        others = [row for other in other_routes for row in running_statistics(trainer.model, other)]
        before = [row.numpy().copy() for row in rows]
        before_others = [row.numpy().copy() for row in others]
        original_average(rows, accelerator)
        after = [row.numpy().copy() for row in rows]
        unchanged = [bool((a == b.numpy()).all()) for a, b in zip(before_others, others, strict=True)]
        statistics.append((before, after, unchanged))

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            weights[:] = [weight.detach().clone() for weight in trainer.model.masked_parameters]

        def on_optimizer_step(self, args, state, control, **kwargs):
            route = batches[-1]["route"]
            rows = [torch.zeros_like(rows, dtype=torch.bool) for rows in trainer.model.private_parameters.rows]
            for row in rows:
                row[route] = True
            masks = [*trainer.model.mask_bank[route], *rows]
            for mask, before, after in zip(masks, weights, trainer.model.masked_parameters, strict=True):
                moved_outside.append(int(((before != after) & ~mask).sum()))

    trainer.training_step = training_step
    trainer.add_callback(Watch())
    with patch.object(route_trainer, "average_over_processes", average):
        trainer.train()
    watched = {"batches": batches, "moved_outside": moved_outside, "statistics": statistics, "wrapped": wrapped}
    return {**summary(trainer), **watched}


def stop_at_collapse(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, with a monitor that takes the first event past 50 % for a collapse."""

    def detect(points: list[Any]) -> dict[str, Change]:
        sparse = [point.sparsity for point in points if point.sparsity > 0.5]
        return {"bee": Change(0, sparse[0], "down", 0.4, 0.4, 0.2)} if sparse else {}

    monitor = CollapseMonitor(stop_on_collapse=True)
    trainer = make_trainer(folder, kind, **options)
    trainer.add_callback(monitor)
    with patch.object(hf_rtl.training.callbacks, "detect_collapse", detect):
        trainer.train()
    similarity = [report["similarity/mean"] for report in trainer.rounds]
    return {**summary(trainer), "similarity": similarity, "num_points": len(monitor.points)}


def add_route(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Adds a route to a model with a router, which is fitted again. Returns the report and the model's state."""
    model = make_model(kind)
    generator = torch.Generator().manual_seed(0)
    for route in range(3):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < 0.3 for shape in model.mask_bank.shapes]
    trainer = make_trainer(folder, kind, model=model, data=Images(48, noise=0.0), calibration_fraction=0.25, **options)
    trainer.fit_router("score")
    report = trainer.add_route("dog", Images(24, noise=0.0))
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "rank": trainer.args.process_index,
        "report": report,
        "state": {name: tensor.numpy() for name, tensor in model.state_dict().items()},
    }


def find_in_one_pass(folder: str) -> dict[str, Any]:
    """Finds tickets in one pass, with and without a refit, on five batches of each route."""
    PartialState(cpu=True)
    model = make_model("vit")
    options = {"sparsity": 0.5, "num_batches": 5, "batch_size": 3, "round_to": 1}
    tickets = find_tickets(model, Images(48, noise=0.0), **options)
    masks = tickets.mask_bank.fingerprint()
    weights = find_tickets(model, Images(48, noise=0.0), granularity="weight", **{**options, "sparsity": 0.7})
    refitted = find_tickets(make_model("vit"), Images(48, noise=0.0), refit=True, **options)
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "rank": PartialState().process_index,
        "order": gather_in_order([*range(5)][PartialState().process_index :: PartialState().num_processes]),
        "masks": [masks, weights.mask_bank.fingerprint(), refitted.mask_bank.fingerprint()],
        "rows": [rows.detach().numpy() for rows in refitted.private_parameters.rows],
    }


def train_in(folder: str, kind: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, with weights and images of `dtype`."""
    model = make_model(kind).to(getattr(torch, dtype))
    return train(folder, kind, {"model": model, "data": Images(dtype=getattr(torch, dtype)), **options})


def fit_routers(folder: str, ticket_task: str) -> dict[str, Any]:
    """Fits every router to tickets with random masks. Returns tensors and metrics; the last batch is not full."""
    for_labels = ticket_task == "labels"
    model = RTLModelForImageClassification.from_backbone(
        SMALL_NET, route_names=ROUTES, ticket_task=ticket_task, seed=0, num_labels=2 if for_labels else 1
    )
    generator = torch.Generator().manual_seed(0)
    for route in range(3):
        masks = [torch.rand(shape, generator=generator) < 0.5 for shape in model.mask_bank.shapes]
        model.mask_bank[route] = masks
    args = RTLTrainingArguments(
        output_dir=folder,
        route_column="domain" if for_labels else None,
        calibration_fraction=0.25,
        per_device_eval_batch_size=4,
        route_batch_size=12,
        report_to=[],
        use_cpu=True,
    )
    data = Domains if for_labels else Images
    trainer = RTLTrainer(model, args, train_dataset=data(noise=0.0), eval_dataset=data(11, noise=0.0))
    found = {}
    for name in ("score", "centroid", "entropy") if for_labels else ("score", "centroid"):
        trainer.fit_router(name)
        tensors = {key: buffer.numpy().copy() for key, buffer in model.router.named_buffers()}
        # The loss is a mean over batches, and times differ; both are left out.
        metrics = {key: value for key, value in trainer.evaluate().items() if "loss" not in key and "time" not in key}
        found[name] = tensors, {key: value for key, value in metrics.items() if not key.endswith("_second")}
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return {"world_size": world_size, "rank": args.process_index, "routers": found}


def search_unequal_routes(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, on 24, 8 and 12 images, with the number of this process's extraction steps for each route."""
    steps: dict[str, int] = {}
    search, step = Extraction.search, TicketTrainer.step
    current = []

    def watched_search(self, route, round_, mask):
        current[:] = [ROUTES[route]]
        return search(self, route, round_, mask)

    def watched_step(self, batch):
        steps[current[0]] = steps.get(current[0], 0) + 1
        return step(self, batch)

    with patch.object(Extraction, "search", watched_search), patch.object(TicketTrainer, "step", watched_step):
        return {**train(folder, "timm", {"data": Images(sizes=[24, 8, 12]), **options}), "steps": steps}


def compute_differently(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, but the gradients of process 1 are wrong."""
    step = TicketTrainer.step

    def altered(self, batch):
        if dist.get_rank() == 1:
            batch = {**batch, "pixel_values": batch["pixel_values"] + 0.5}
        return step(self, batch)

    with patch.object(TicketTrainer, "step", altered):
        return train(folder, "vit", options)


def receive_other_masks(folder: str) -> dict[str, Any]:
    """As `train`, but process 1 receives a mask of route 0 with one wrong bit."""
    merge = Processes.merge_routes

    def altered(self, *arguments):
        rows = merge(self, *arguments)
        if self.rank == 1:
            rows[0, 0] ^= 1
        return rows

    with patch.object(Processes, "merge_routes", altered):
        return train(folder, "timm", {})


def disagree(folder: str, change: str) -> dict[str, Any]:
    """As `train`, but process 1 would compute something else."""
    other = os.environ["RANK"] == "1"
    options: dict[str, Any] = {}
    if other and change == "seed":
        options["seed"] = 7
    if other and change == "threads":
        options["extraction_threads"] = 2
    if other and change == "weights":
        options["model"] = make_model("timm")
        with torch.no_grad():
            next(options["model"].parameters())[0] += 1
    if other and change == "data":
        options["data"] = Images()
        options["data"].images += 1
    if other and change == "version":
        torch.__version__ = "1.0"
    if other and change == "precision":
        torch.set_float32_matmul_precision("medium")
    return train(folder, "timm", options)


def fail(folder: str, kind: str, place: str, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, but process `rank` raises in the middle of extraction or of joint retraining."""
    calls = []

    def counting(original):
        def called(*arguments, **keywords):
            calls.append(None)
            if len(calls) == 5 and int(os.environ.get("RANK", 0)) == rank:
                raise ValueError("something is wrong with sample 17")
            return original(*arguments, **keywords)

        return called

    owner, name = {"extraction": (TicketTrainer, "step"), "retraining": (RTLTrainer, "training_step")}[place]
    with patch.object(owner, name, counting(getattr(owner, name))):
        return train(folder, kind, options)


def train_for_long(folder: str, place: str) -> None:
    """Trains until it is killed: in extraction once its first mask is there, or in joint retraining."""
    hf_rtl.training.processes.PATIENCE = 2
    steps = 10**9
    if place == "retraining":
        train(folder, "timm", {"max_steps": steps, "save_strategy": "steps", "save_steps": 2})
    step = TicketTrainer.step

    def endless(self, batch):
        while list(Path(folder).glob("extraction/event-000/*")):
            time.sleep(0.1)
        return step(self, batch)

    with patch.object(TicketTrainer, "step", endless):
        train(folder, "timm", {})


def dawdle(folder: str, seconds: float, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, but process 1 takes long to find its ticket."""
    search = Extraction.search

    def slow(self, *arguments):
        if dist.get_rank() == 1:
            time.sleep(seconds)
        return search(self, *arguments)

    with patch.object(Extraction, "search", slow):
        return train(folder, "timm", options)


def fill_the_disk(folder: str, place: str, options: dict[str, Any]) -> dict[str, Any]:
    """As `train`, but from `place` on, files may not grow beyond a size."""

    def limited(original, size):
        def called(*arguments, **keywords):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return original(*arguments, **keywords)

        return called

    owner, name, size = {
        "extraction": (TicketTrainer, "train", 2**12),
        "checkpoint": (RTLTrainer, "_save_optimizer_and_scheduler", 2**16),
        "model": (RTLTrainer, "recalibrate", 2**16),
    }[place]
    with patch.object(owner, name, limited(getattr(owner, name), size)):
        return train(folder, "resnet", options)


def exhaust_memory(folder: str) -> dict[str, Any]:
    """As `train`, but a step asks for more memory than any machine has."""

    def step(self, batch):
        return torch.empty(2**50)

    with patch.object(TicketTrainer, "step", step):
        return train(folder, "timm", {})


def write_into_a_read_only_folder(folder: str) -> dict[str, Any]:
    """As `train`, on a disk that has become read-only."""

    def refuse(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[-1]))

    with patch.object(os, "replace", refuse), patch.object(Path, "touch", refuse):
        return train(folder, "timm", {})


def train_apart(folders: list[str]) -> dict[str, Any]:
    """As `train`, each process in a working directory of its own, as on machines that share no disk."""
    hf_rtl.training.processes.SHARED_FOLDER_PATIENCE = 1.0
    os.chdir(folders[int(os.environ["RANK"])])
    return train("run", "timm", {})


def fail_to_begin(folder: str) -> dict[str, Any]:
    """As `train`, but process 0 fails before it makes its trainer."""
    hf_rtl.training.processes.PATIENCE = 1
    trainer = make_trainer(folder)
    if dist.get_rank() == 0:
        raise ValueError("no such data")
    time.sleep(1)
    trainer.train()
    return summary(trainer)
