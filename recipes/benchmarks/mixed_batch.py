"""
Measure the time of a batch whose samples take several routes, as ratios to the plain network on the same batch.

    PYTHONPATH=recipes python -m benchmarks.mixed_batch

Samples are grouped by route once, and every group runs through its own ticket. The baseline is the same network
without masks on the whole batch: one forward, or for training one forward and backward. All kinds of step take turns,
to share the load of the machine. A result is the ratio of the medians, with the quartiles of the ratios in a turn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLModelForSequenceClassification

from .timing import draw_masks, in_turn, parse, ratio, report


NUM_ROUTES = 8
NUMS_IN_BATCH = (1, 2, 4, 8)
BERT = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)


def main() -> None:
    arguments, device = parse(__doc__)
    lines = [line for case in cases(arguments.density) for line in measure(*case, device, arguments.turns)]
    report(lines, __spec__.name, arguments, device)


def cases(density: float) -> list[tuple[str, RTLModel, dict[str, Tensor]]]:
    """(name, model with random masks, inputs of a batch with labels)."""
    names = {"route_names": [f"route {k}" for k in range(NUM_ROUTES)], "ticket_task": "labels", "seed": 0}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(320, 3, 32, 32, generator=generator)
    tokens = torch.randint(1000, (64, 64), generator=generator)
    ghostnet = RTLModelForImageClassification.from_backbone("ghostnet_rtl", num_labels=10, **names)
    bert = RTLModelForSequenceClassification.from_backbone(BERT, num_labels=2, **names)
    for model in (ghostnet, bert):
        draw_masks(model, density, generator)
    return [
        ("ghostnet_rtl, 32x32", ghostnet, {"pixel_values": images, "labels": torch.arange(320) % 10}),
        ("BERT, 4 layers of 256, 64 tokens", bert, {"input_ids": tokens, "labels": torch.arange(64) % 2}),
    ]


def measure(
    name: str, model: RTLModel, inputs: dict[str, Tensor], device: torch.device, turns: int
) -> list[dict[str, Any]]:
    """A line of times and ratios for every number of routes in the batch."""
    inputs = {argument: value.to(device) for argument, value in inputs.items()}
    num_samples = len(inputs["labels"])
    dense = copy.deepcopy(model.backbone).to(device)
    model.to(device)
    calls: dict[Any, Callable[[], Any]] = {"dense": partial(dense, **inputs)}
    for number in NUMS_IN_BATCH:
        route_ids = (torch.arange(num_samples) % number).tolist()
        calls[number] = partial(model, **inputs, route_ids=route_ids)
    kinds = {}
    for kind, training in (("inference", False), ("forward and backward", True)):
        for network in (model, dense):
            network.train(training)
        kinds[kind] = in_turn({number: step(call, training) for number, call in calls.items()}, device, turns)
    lines = []
    for number in NUMS_IN_BATCH:
        line = {"backbone": name, "batch": num_samples, "routes in it": number}
        for kind, times in kinds.items():
            line[f"{kind} (ms)"] = 1e3 * statistics.median(times[number])
            line[f"{kind} ratio"], line[f"{kind} quartiles"] = ratio(times[number], times["dense"])
        lines.append(line)
    return lines


def step(call: Callable[[], Any], training: bool) -> Callable[[], None]:
    def inference_step() -> None:
        with torch.inference_mode():
            call()

    def training_step() -> None:
        call().loss.backward()

    return training_step if training else inference_step


if __name__ == "__main__":
    main()
