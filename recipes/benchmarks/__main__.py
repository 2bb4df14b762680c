"""
Measure what hf_rtl costs, each figure beside that of its rival in one process, in turn, on one thread.

    PYTHONPATH=recipes python -m benchmarks
    PYTHONPATH=recipes python -m benchmarks --only serving,ends --turns 5

The parts:

    serving   answers of one route, of routes in turn, of mixed batches and of small tickets, against extracted
              tickets; and groups in a batch against LoRA adapters of PEFT
    training  whole runs against transformers' Trainer and bare PyTorch steps; single steps against dense ones
    growth    time, bytes and memory with the number of routes, weights and samples
    ends      the import, the help of the command line, and what the shortest run costs
    gpu       steps, answers and a search on a GPU; nothing where there is none

A ratio is that of medians of the time of the processor, which a busy machine changes least; its quartiles are of the
ratios in a turn. At the end stands a table with the aim of every figure. Several processes are measured apart, by
`python -m benchmarks.scaling`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

from hf_rtl.modeling.files import write_json

from . import ends, gpu, growth, serving, training
from .timing import command_line


PARTS = {"serving": serving, "training": training, "growth": growth, "ends": ends, "gpu": gpu}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, Any] = {
        "command": command_line(__package__),
        "device": "CPU, 1 thread" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "figures": [],
    }
    for name in arguments.only:
        start = time.perf_counter()
        options = {"full": arguments.full} if name == "growth" else {}
        found = PARTS[name].measure(arguments.turns, **options)
        results["figures"] += [{"part": name, **line} for line in found.pop("figures")]
        results.update(found)
        print(f"{name}: {time.perf_counter() - start:.0f} seconds", flush=True)
    show(results)
    if "gpu" in arguments.only and not torch.cuda.is_available():
        print(gpu.NO_DEVICE)
    if arguments.output is not None:
        write_json(arguments.output, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=read_parts, default=list(PARTS), help=f"parts to measure, of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--turns", type=int, default=15, help="turns, at least 2; slow figures get fewer, at least 3 (default: 15)"
    )
    parser.add_argument(
        "--full", action="store_true", help=f"also the similarity of {growth.MANY_ROUTES:,} routes, which takes long"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


def read_parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown parts: {', '.join(map(repr, unknown))}; write some of {','.join(PARTS)}, with commas between"
        )
    return parts


def show(results: dict[str, Any]) -> None:
    """Prints all tables, the figures with their aims last."""
    for name, value in results.items():
        if name != "figures" and isinstance(value, list) and value:
            print(f"\n{name.replace('_', ' ')}\n{tabulate(value, headers='keys', floatfmt='.3f')}")
    if "break_even" in results:
        print(f"\n{results['break_even']}")
    print("\n" + tabulate(results["figures"], headers="keys", floatfmt=".3f"))


if __name__ == "__main__":
    main()
