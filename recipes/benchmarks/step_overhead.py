"""
Measure the time of a step of joint retraining and of extraction, as ratios to a plain dense PyTorch step.

    PYTHONPATH=recipes python -m benchmarks.step_overhead

The baseline is forward, backward and fused AdamW on the same backbone, data and loss. The three kinds of step take
turns, to share the load of the machine. A result is the ratio of medians, with quartiles of the ratios in a turn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_rtl import MaskedAdamW, RTLModelForImageClassification
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state

from .timing import draw_masks, in_turn, parse, ratio, report


# (backbone, batch size, image side)
CASES = (("ghostnet_rtl", 320, 32), ("resnet18", 64, 64))
NUM_ROUTES = 10


def main() -> None:
    arguments, device = parse(__doc__)
    figures = [measure(*case, device, arguments.turns, arguments.density) for case in CASES]
    report(figures, __spec__.name, arguments, device)


def measure(backbone: str, batch_size: int, side: int, device: torch.device, turns: int, density: float) -> dict:
    """Medians in milliseconds and ratios of one case."""
    model = RTLModelForImageClassification.from_backbone(
        backbone, route_names=[f"route {k}" for k in range(NUM_ROUTES)], ticket_task="membership", seed=0
    )
    draw_masks(model, density, torch.Generator().manual_seed(0))
    masks = model.mask_bank[0]
    dense = copy.deepcopy(model.backbone).to(device).train()
    network = copy.deepcopy(model.backbone).to(device)
    model.to(device).train()
    pixels = torch.randn(batch_size, 3, side, side, device=device)
    labels = torch.arange(batch_size, device=device) % 2
    steps = {
        "dense": dense_step(dense, pixels, labels),
        "joint retraining": retraining_step(model, pixels, labels),
        "extraction": extraction_step(network, model.mask_bank.weight_names, masks, pixels, labels),
    }
    times = in_turn(steps, device, turns)
    figures: dict = {"backbone": backbone, "batch": batch_size, "image": side}
    figures.update({f"{name} (ms)": 1e3 * statistics.median(values) for name, values in times.items()})
    for name in ("joint retraining", "extraction"):
        figures[f"{name} ratio"], figures[f"{name} quartiles"] = ratio(times[name], times["dense"])
    return figures


def dense_step(network: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """The baseline: a step of plain PyTorch."""
    timm_model = network.timm_model
    optimizer = torch.optim.AdamW(timm_model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    targets = labels.float().unsqueeze(-1)

    def step() -> None:
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(timm_model(pixels), targets).backward()
        optimizer.step()

    return step


def retraining_step(
    model: RTLModelForImageClassification, pixels: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """A step of the paper's Algorithm 2, for the next route at each call."""
    optimizer = MaskedAdamW(model.parameters(), model, lr=1e-4)
    routes = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        with model.route_context(next(routes) % NUM_ROUTES):
            model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()

    return step


def extraction_step(
    network: torch.nn.Module, names: list[str], masks: list, pixels: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    """A step of the paper's Algorithm 1, on a copy whose pruned weights are zero."""
    theta0 = {name: tensor.detach().cpu().clone() for name, tensor in named_state(network)}
    batch = {"pixel_values": pixels, "labels": labels.float().unsqueeze(-1)}
    trainer = TicketTrainer(
        network,
        theta0,
        names,
        lambda net: torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True),
        lambda net, inputs: net(**inputs).loss,
    )
    trainer.begin(masks)
    return lambda: trainer.step(batch)


if __name__ == "__main__":
    main()
