"""What every start costs: the import, the help of the command line, and a training of hardly any steps."""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import hf_rtl.plots
import hf_rtl.training.trainer
from hf_rtl import RTLTrainer
from hf_rtl.training.extraction import Extraction

from .cases import Case
from .child import in_child
from .timing import Times, alone, compare, timed
from .training import Samples, plain_run, routed_trainer


OURS = ("import hf_rtl",)
RIVALS = ("import torch", "import timm", "from transformers import PreTrainedModel, Trainer")
HELP = "import sys; from hf_rtl_cli.main import main; sys.argv = ['hf-rtl', '--help']; main()"
# More processes say no more.
MOST_TURNS = 5
TINY, TINY_STEPS = Case("test_resnet", "test_resnet", (8, 3, 16, 16)), 6
# The parts of a run, by the functions that do them. Time in a part within another is of the inner one alone.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("checks, and the rehearsal of all that comes after extraction", hf_rtl.training.trainer, "open_run"),
    ("extraction, 3 steps", Extraction, "run"),
    ("joint retraining, 3 steps", RTLTrainer, "retrain_jointly"),
    ("statistics of every ticket, taken anew", RTLTrainer, "recalibrate"),
    ("models on disk", RTLTrainer, "save_model"),
    ("the card", RTLTrainer, "create_model_card"),
    ("the card's picture, and matplotlib", hf_rtl.plots, "similarity_heatmap"),
    ("garbage collection, which accelerate asks for", gc, "collect"),
)
REST = "plan, log, messages"
AIM_IMPORT, AIM_HELP, AIM_RUN = 1.1, 0.3, 3.0


def measure(turns: int) -> dict[str, Any]:
    """The tables `figures` and `parts_of_a_run`."""
    turns = min(turns, MOST_TURNS)
    ours, rival, helps = Times(), Times(), Times()
    for _ in range(turns):
        for times, statements in ((ours, OURS), (rival, RIVALS)):
            found = import_seconds(statements)
            times.process.append(found[0])
            times.wall.append(found[1])
        found = child_seconds([sys.executable, "-c", HELP])
        helps.process.append(found[0])
        helps.wall.append(found[1])
    run = in_child(tiny_run)
    return {
        "figures": [
            compare("import hf_rtl", ours, "import torch, timm, Trainer, PreTrainedModel", rival, aim=AIM_IMPORT),
            alone("hf-rtl --help", statistics.median(helps.process), "s", aim=AIM_HELP),
            alone(f"constant cost of a run of {TINY_STEPS} steps", run["first"], "s", aim=AIM_RUN),
            alone("the same again, when all is imported", run["again"], "s"),
            alone(f"`Trainer` itself, {TINY_STEPS} dense steps, nothing saved", run["Trainer"], "s"),
        ],
        "parts_of_a_run": run["parts"],
    }


def import_seconds(statements: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of an import in a new process, without the start of Python."""
    clocks = "(time.process_time(), time.perf_counter())"
    code = "\n".join(["import time", f"start = {clocks}", *statements, f"print(*start, *{clocks})"])
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    begin, wall_begin, end, wall_end = map(float, found.stdout.split())
    return end - begin, wall_end - wall_begin


def child_seconds(command: list[str]) -> tuple[float, float]:
    """Seconds of a whole process, by the processor's clock and by the wall's."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def tiny_run() -> dict[str, Any]:
    """
    Seconds of the processor in a training of hardly any steps, with all files, the card and its picture; in `parts`
    they are told apart.
    """
    samples, totals, seconds = Samples(TINY.shape), {}, {}
    for name in ("first", "again"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = routed_trainer(TINY, samples, TINY_STEPS, folder, save_strategy="steps")
            with parts_timed() as seconds[name]:
                totals[name] = timed(trainer.train)[0]
        seconds[name][REST] = totals[name] - sum(seconds[name].values())
    parts = [
        {"part": part, "first run (s)": seconds["first"][part], "again (s)": seconds["again"][part]}
        for part in (*(name for name, _, _ in PARTS), REST)
    ]
    parts.append({"part": "all", "first run (s)": totals["first"], "again (s)": totals["again"]})
    return {**totals, "Trainer": timed(lambda: plain_run(TINY, samples, TINY_STEPS))[0], "parts": parts}


@contextlib.contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Name of a part -> its seconds of the processor within the context."""
    seconds = dict.fromkeys((name for name, _, _ in PARTS), 0.0)
    within: list[float] = []

    def timed_part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def part(*args: Any, **kwargs: Any) -> Any:
            within.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                seconds[name] += spent - within.pop()
                if within:
                    within[-1] += spent

        return part

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, timed_part(name, getattr(owner, attribute))))
        yield seconds
