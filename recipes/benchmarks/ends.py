"""What every start costs: the import, the help of the command line, and a training of hardly any steps."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from .cases import Case
from .child import in_child
from .timing import Times, alone, compare, timed
from .training import Samples, routed_trainer


OURS = ("import hf_rtl",)
RIVALS = ("import torch", "import timm", "from transformers import PreTrainedModel, Trainer")
HELP = "import sys; from hf_rtl_cli.main import main; sys.argv = ['hf-rtl', '--help']; main()"
# More processes say no more.
MOST_TURNS = 5
AIM_IMPORT, AIM_HELP, AIM_RUN = 1.1, 0.3, 3.0


def measure(turns: int) -> dict[str, Any]:
    """The table `figures`."""
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
            alone("constant cost of a run of 6 steps", run["first"], "s", aim=AIM_RUN),
            alone("the same again, when all is imported", run["again"], "s"),
            alone("the same again, without statistics taken anew", run["without statistics"], "s"),
        ]
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
    """Seconds of the processor in a training of hardly any steps, with all files, the card and its picture."""
    case, found = Case("test_resnet", "test_resnet", (8, 3, 16, 16)), {}
    for name, options in (("first", {}), ("again", {}), ("without statistics", {"recalibration_batches": 0})):
        with tempfile.TemporaryDirectory() as folder:
            trainer = routed_trainer(case, Samples(case.shape), 6, folder, save_strategy="steps", **options)
            found[name] = timed(trainer.train)[0]
    return found
