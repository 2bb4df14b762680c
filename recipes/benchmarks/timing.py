"""The arguments, the masks, the measuring in turns and the report of the benchmarks of steps."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from hf_rtl import RTLModel
from hf_rtl.modeling.files import write_json


# Turns that are not counted.
WARM_UP = 3


def parse(description: str) -> tuple[argparse.Namespace, torch.device]:
    """The arguments of the command line, and the device to measure on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, help="measured steps of every kind (default: 20)")
    parser.add_argument("--density", type=float, default=0.5, help="density of the random masks (default: 0.5)")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch decides")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw_masks(model: RTLModel, density: float, generator: torch.Generator) -> None:
    """Gives every route of the model random masks of a density."""
    bank = model.mask_bank
    for route in range(bank.num_routes):
        bank[route] = [torch.rand(shape, generator=generator) < density for shape in bank.shapes]


def command_line(module: str) -> str:
    """The command line that starts a module of the benchmarks in the root of the repository."""
    # sys.argv[0] is the path of the module on this machine.
    return shlex.join(["PYTHONPATH=recipes", "python", "-m", module, *sys.argv[1:]])


def report(
    figures: Sequence[dict[str, Any]], module: str, arguments: argparse.Namespace, device: torch.device
) -> None:
    """Prints the results of a module, and writes them into `--output` with the device and the command."""
    print(tabulate(figures, headers="keys", floatfmt=".3f"))
    if arguments.output is None:
        return
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    made = {"device": name, "torch": torch.__version__, "turns": arguments.turns}
    write_json(arguments.output, {**made, "command": command_line(module), "figures": list(figures)})


def in_turn(steps: Mapping[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Seconds of every step in every turn, after `WARM_UP` turns that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + WARM_UP):
        for name, step in steps.items():
            elapsed = _timed(step, device)
            if turn >= WARM_UP:
                times[name].append(elapsed)
    return times


def ratio(times: list[float], floor: list[float]) -> tuple[float, str]:
    """The ratio of the medians, and the quartiles of the ratios within a turn."""
    low, _, high = statistics.quantiles([value / least for value, least in zip(times, floor, strict=True)], n=4)
    return statistics.median(times) / statistics.median(floor), f"{low:.3f}-{high:.3f}"


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
