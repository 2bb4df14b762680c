"""Measuring in turns with two clocks, and the lines of figures that are made of it."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


CPU = torch.device("cpu")
# A turn repeats short steps until the shortest takes as long as this.
SECONDS_IN_TURN = 0.02
# No more turns begin after this time, once there are enough for quartiles.
SECONDS = 10.0
FEWEST_TURNS = 3


@dataclass
class Times:
    """Seconds of a step in every turn, by the clock of the processor and by that of the wall."""

    process: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def command_line(module: str) -> str:
    """The command line that starts a module of the benchmarks in the root of the repository."""
    # sys.argv[0] is the path of the module on this machine.
    return shlex.join(["PYTHONPATH=recipes", "python", "-m", module, *sys.argv[1:]])


def in_turn(
    steps: Mapping[str, Callable[[], object]],
    turns: int,
    device: torch.device = CPU,
    *,
    seconds: float = SECONDS,
    warm_up: bool = True,
) -> dict[str, Times]:
    """
    The times of every step in every turn, after two turns that are not counted: the first is slow, the second says how
    often a step is repeated. Slow steps get fewer turns, but at least `FEWEST_TURNS`, or `turns` if that is less.
    """
    repeats = 1
    if warm_up:
        for step in steps.values():
            step()
        shortest = min(timed(step, device)[1] for step in steps.values())
        repeats = math.ceil(SECONDS_IN_TURN / shortest)
    times = {name: Times() for name in steps}
    start = time.perf_counter()
    for turn in range(turns):
        if turn >= FEWEST_TURNS and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            process, wall = timed(step, device, repeats)
            times[name].process.append(process)
            times[name].wall.append(wall)
    return times


def difference(long: Times, short: Times) -> Times:
    """What the long steps took more than the short ones of the same turn."""
    process, wall = (
        [more - less for more, less in zip(*both, strict=True)]
        for both in ((long.process, short.process), (long.wall, short.wall))
    )
    return Times(process, wall)


def timed(step: Callable[[], object], device: torch.device = CPU, repeats: int = 1) -> tuple[float, float]:
    """Seconds of a step by the clock of the processor, for all threads of this process, and by that of the wall."""
    _wait(device)
    process, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.process_time() - process) / repeats, (time.perf_counter() - wall) / repeats


def ratio(times: Sequence[float], floor: Sequence[float]) -> tuple[float, str]:
    """The ratio of the medians, and the quartiles of the ratios within a turn."""
    low, _, high = statistics.quantiles([value / least for value, least in zip(times, floor, strict=True)], n=4)
    return statistics.median(times) / statistics.median(floor), f"{low:.3f}-{high:.3f}"


def compare(
    figure: str, ours: Times, against: str, rival: Times, *, aim: float | None = None, clock: str = "process"
) -> dict[str, Any]:
    """The line of a figure: medians by `clock`, `"process"` or `"wall"`, their ratio, and the ratio by the wall."""
    own, other = getattr(ours, clock), getattr(rival, clock)
    found, quartiles = ratio(own, other)
    return {
        "figure": figure,
        "against": against,
        "ours": 1e3 * statistics.median(own),
        "rival": 1e3 * statistics.median(other),
        "unit": "ms",
        "ratio": found,
        "quartiles": quartiles,
        "ratio by the wall": ratio(ours.wall, rival.wall)[0],
        "aim": aim,
        "result": verdict(found, aim),
        "turns": len(own),
    }


def alone(figure: str, value: float, unit: str, *, aim: float | None = None) -> dict[str, Any]:
    """The line of a figure without a rival, whose aim is in the same unit."""
    empty = dict.fromkeys(("against", "rival", "ratio", "quartiles", "ratio by the wall", "turns"))
    line = {"figure": figure, "ours": value, "unit": unit, "aim": aim, "result": verdict(value, aim)}
    return {title: {**empty, **line}[title] for title in compare_titles()}


def compare_titles() -> tuple[str, ...]:
    """The titles of a line of figures, in order."""
    first = ("figure", "against", "ours", "rival", "unit", "ratio", "quartiles", "ratio by the wall")
    return (*first, "aim", "result", "turns")


def verdict(value: float, aim: float | None) -> str | None:
    return None if aim is None else "met" if value <= aim else "missed"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
