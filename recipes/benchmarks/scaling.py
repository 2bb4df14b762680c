"""
Measure the speed-up by several processes, of the same extraction and the same joint retraining.

    PYTHONPATH=recipes python -m benchmarks.scaling --turns 3 --output FILE

Every measurement is a whole run in fresh processes, each with one CPU thread or one GPU of its own: one process as
`python` starts it, several by torch's launcher. The two kinds of run take turns, so that they share the load of the
machine. A result is the ratio of their times within a turn. Extraction is timed from when all processes are ready
until every process has all masks. Start-up (imports, data and model) is timed too. All runs must find the same masks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from hf_rtl import RTLTrainer, RTLTrainingArguments
from hf_rtl.modeling.files import write_json
from hf_rtl.training.extraction import Extraction
from shared.arguments import parse
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from shared.models import membership_model

from .timing import command_line


# As in recipes/configs/cifar10.yaml; nothing is evaluated.
CIFAR10 = {"dataset": "uoft-cs/cifar10", "input_column": "img", "max_train_samples": 10000, "max_test_samples": 10}
# Steps of joint retraining that are not timed, one of each route.
WARM_UP = 10


@dataclass
class ScalingArguments:
    """What is measured, and how often."""

    processes: int = HfArg(default=2, help="Processes to compare with one.")
    turns: int = HfArg(default=3, help="Runs of each kind.")
    backbone: str = HfArg(default="ghostnet_rtl", help="A timm name, a repo id or a folder.")
    route_batch_size: int = HfArg(default=128, help="Samples per batch, over all processes.")
    extraction_steps: int = HfArg(default=30, help="Steps of a training in extraction; every route has two trainings.")
    retraining_steps: int = HfArg(default=110, help=f"Steps of joint retraining; the first {WARM_UP} are not timed.")
    output: str | None = HfArg(default=None, help="JSON file for the results.")
    measure: str | None = HfArg(default=None, help="Internal: run as one process of a measured run in this folder.")


def main() -> None:
    arguments, data = parse((ScalingArguments, DataArguments), description=__doc__, defaults=CIFAR10)
    if arguments.measure is not None:
        measure(arguments, data, Path(arguments.measure))
        return
    if arguments.retraining_steps <= WARM_UP:
        raise SystemExit(f"--retraining_steps must be more than {WARM_UP}, got {arguments.retraining_steps}.")
    num_gpus = torch.cuda.device_count()
    if arguments.processes < 2 or 0 < num_gpus < arguments.processes:
        limit = f", and at most {num_gpus}, the number of GPUs" if num_gpus else ""
        raise SystemExit(f"--processes must be at least 2{limit}; got {arguments.processes}.")
    measured: list[dict[str, Any]] = []
    for turn in range(arguments.turns):
        for num_processes in (1, arguments.processes):
            measured.append({"turn": turn + 1, **run(num_processes)})
            print(json.dumps(measured[-1]), flush=True)
    fingerprints = {one["masks"] for one in measured}
    if len(fingerprints) > 1:
        raise SystemExit(f"the runs found different masks, so their times cannot be compared: {sorted(fingerprints)}")
    figures = [
        compare(measured, arguments.processes, "startup_seconds", "start-up (s)"),
        compare(measured, arguments.processes, "extraction_seconds", "extraction (s)"),
        compare(measured, arguments.processes, "step_milliseconds", "joint retraining (ms per step)"),
    ]
    print(tabulate(figures, headers="keys", floatfmt=".2f"))
    print(f"the masks of all {len(measured)} runs are the same: {fingerprints.pop()}")
    if arguments.output is not None:
        content = {
            "device": measured[0]["device"],
            "torch": torch.__version__,
            "command": command_line(__spec__.name),
            "processes": arguments.processes,
            "turns": arguments.turns,
            "batch": arguments.route_batch_size,
            "extraction_steps": arguments.extraction_steps,
            "timed_steps": arguments.retraining_steps - WARM_UP,
            "images": data.max_train_samples,
            "masks": measured[0]["masks"],
        }
        write_json(Path(arguments.output), {**content, "measured": measured, "figures": figures})


def compare(measured: list[dict[str, Any]], processes: int, name: str, title: str) -> dict[str, Any]:
    """A line of the table: medians, and the ratios of one process to several within each turn."""
    alone = [entry[name] for entry in measured if entry["processes"] == 1]
    together = [entry[name] for entry in measured if entry["processes"] == processes]
    ratios = [one / several for one, several in zip(alone, together, strict=True)]
    return {
        "work": title,
        "1 process": statistics.median(alone),
        f"{processes} processes": statistics.median(together),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ratios by turn": ", ".join(f"{ratio:.2f}" for ratio in ratios),
    }


def run(num_processes: int) -> dict[str, Any]:
    """Measures one run in fresh processes."""
    # One process starts without the launcher, under which accelerate would wrap it in DDP, which costs time.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_processes)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:num_processes])
    with tempfile.TemporaryDirectory() as folder:
        module = ["-m", __spec__.name, *sys.argv[1:], "--measure", folder]
        start = time.time()
        subprocess.run(
            [sys.executable, *(launcher if num_processes > 1 else []), *module], env=environment, check=True
        )
        measured = json.loads((Path(folder) / "measured.json").read_text())
    if measured["processes"] != num_processes:
        raise SystemExit(f"{num_processes} processes were started, but the run had {measured['processes']}.")
    ready = measured.pop("ready")
    return {"processes": measured.pop("processes"), "startup_seconds": ready - start, **measured}


def measure(arguments: ScalingArguments, data: DataArguments, folder: Path) -> None:
    """Runs as one process of a measured run; the first process writes measured.json."""
    transformers.utils.logging.disable_progress_bar()
    train, _ = load_images(data, seed=0)
    model = membership_model(arguments.backbone, train, seed=0)
    args = RTLTrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=not torch.cuda.is_available(),
        # Two prune events, so that the second trains with a mask.
        target_sparsity=[0.5],
        prune_amount=0.3,
        extraction_steps=arguments.extraction_steps,
        max_steps=arguments.retraining_steps,
        route_batch_size=arguments.route_batch_size,
        learning_rate=1e-3,
        seed_transforms=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    clock = Clock()
    clock.watch_extraction()
    trainer = RTLTrainer(model, args, train_dataset=train, callbacks=[clock])
    trainer.train()
    processes = trainer.processes.gather(os.getpid())
    if trainer.is_world_process_zero():
        device = args.device
        write_json(
            folder / "measured.json",
            {
                "processes": len(set(processes)),
                "ready": clock.ready,
                "extraction_seconds": clock.seconds,
                "step_milliseconds": 1e3 * (clock.ticks[1] - clock.ticks[0]) / (arguments.retraining_steps - WARM_UP),
                "masks": model.mask_bank.fingerprint(),
                "device": torch.cuda.get_device_name()
                if device.type == "cuda"
                else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) per process",
            },
        )


class Clock(TrainerCallback):
    """
    Times extraction in `seconds`; `ready` is the time at which all processes were ready for it. `ticks` are the times
    at which joint retraining had warmed up and had ended.
    """

    def __init__(self) -> None:
        self.ready = 0.0
        self.seconds = 0.0
        self.ticks: list[float] = []

    def watch_extraction(self) -> None:
        """Times every round's extraction in this process from now on."""
        find = Extraction.run

        def run(extraction: Extraction, *args: Any) -> Any:
            extraction.processes.wait()
            self.ready = self.ready or time.time()
            start = time.perf_counter()
            masks = find(extraction, *args)
            self.seconds += time.perf_counter() - start
            return masks

        Extraction.run = run  # type: ignore[method-assign]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.ticks.append(time.perf_counter())


if __name__ == "__main__":
    main()
