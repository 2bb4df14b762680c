"""
Measure steps, answers and a search in one pass on a GPU, and count how often the host waits for the device.

    PYTHONPATH=recipes python -m benchmarks.gpu

Without a device it says so, and ends. It needs nothing but hf_rtl with torch, timm, transformers and accelerate.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_rtl import find_tickets

from .cases import BERT, Case, extract_all, with_random_masks
from .serving import answers
from .timing import compare, in_turn, timed
from .training import dense_step, extraction_step, retraining_step


TRAINED = (
    Case("ResNet-18, 64 images of 64 px", "resnet18", (64, 3, 64, 64)),
    Case("BERT 6 x 384, 32 texts of 64 tokens", BERT, (32, 64)),
)
ANSWERING = (
    Case("ResNet-18, 224 px", "resnet18", (1, 3, 224, 224)),
    Case("BERT 6 x 384, 16 tokens", BERT, (1, 16)),
)
SEARCHED = TRAINED[1]
NUM_ROUTES, TURNS = 4, 15


def main() -> None:
    found = measure(TURNS)
    print(json.dumps(found, indent=2) if found["figures"] else NO_DEVICE)


NO_DEVICE = "gpu: there is no CUDA device here, so nothing is measured."


def measure(turns: int) -> dict[str, Any]:
    """The tables `figures` and `synchronisations`; empty ones without a device."""
    if not torch.cuda.is_available():
        return {"figures": [], "synchronisations": []}
    device = torch.device("cuda")
    lines, counts = [], []
    for measured in (*((steps, case) for case in TRAINED), *((serving, case) for case in ANSWERING)):
        found, waits = measured[0](measured[1], turns, device)
        lines += found
        counts += waits
    process, wall = timed(lambda: search(SEARCHED, device), device)
    counts.append({"what": f"search in one pass: {SEARCHED.name}", "seconds": wall, "processor seconds": process})
    return {"figures": lines, "synchronisations": counts}


def steps(case: Case, turns: int, device: torch.device) -> tuple[list[dict], list[dict]]:
    """Steps of joint retraining and of extraction against dense ones, by the wall's clock."""
    inputs = {**case.inputs(), "labels": torch.arange(case.shape[0]) % 2}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    model = with_random_masks(case.model(NUM_ROUTES)).to(device).train()
    kinds = {
        "dense": dense_step(copy.deepcopy(model.backbone), inputs),
        "extraction": extraction_step(copy.deepcopy(model), inputs),
        "joint": retraining_step(model, inputs),
    }
    times = in_turn(kinds, turns, device)
    lines = [
        compare(f"{kind} step on a GPU: {case.name}", times[kind], "dense step", times["dense"], clock="wall")
        for kind in ("joint", "extraction")
    ]
    return lines, [{"what": f"{kind} step: {case.name}", "waits": count_waits(step)} for kind, step in kinds.items()]


def serving(case: Case, turns: int, device: torch.device) -> tuple[list[dict], list[dict]]:
    """Routes in turn against extracted tickets, and a mixed batch, by the wall's clock."""
    model = with_random_masks(case.model(NUM_ROUTES)).to(device).eval()
    tickets = extract_all(model)
    inputs = {name: value.to(device) for name, value in case.inputs().items()}
    many = {name: value.repeat_interleave(NUM_ROUTES, dim=0) for name, value in inputs.items()}
    kinds = {
        "routes in turn": answers(lambda: [model(**inputs, route_ids=route) for route in range(NUM_ROUTES)]),
        "mixed batch": answers(lambda: model(**many, route_ids=list(range(NUM_ROUTES)))),
        "tickets": answers(lambda: [ticket(**inputs) for ticket in tickets]),
    }
    times = in_turn(kinds, turns, device)
    lines = [
        compare(f"{kind} on a GPU: {case.name}", times[kind], "extracted tickets", times["tickets"], clock="wall")
        for kind in ("routes in turn", "mixed batch")
    ]
    return lines, [{"what": f"{kind}: {case.name}", "waits": count_waits(call)} for kind, call in kinds.items()]


def count_waits(step: Callable[[], object]) -> int:
    """How often the host waits for the device in a step, as far as torch says so."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


class Texts(Dataset):
    """The samples of a batch, which take the routes in turn."""

    def __init__(self, case: Case) -> None:
        self.inputs = case.inputs()["input_ids"]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.inputs[index], "labels": index % 2, "route": f"route {index % NUM_ROUTES}"}


def search(case: Case, device: torch.device) -> None:
    """Finds the neurons of all routes in one pass."""
    network = case.model(1).backbone.to(device)
    find_tickets(network, Texts(case), sparsity=0.5, route_column="route", num_batches=2, batch_size=4)


if __name__ == "__main__":
    main()
