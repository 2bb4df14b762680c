"""Runs of several methods and seeds on the same data, each trained once and read back afterwards."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_rtl import RTLTrainer, RTLTrainingArguments
from hf_rtl.modeling.files import write_json


# The baselines for any data: one network for all routes, not pruned; the same with one mask of the tickets' density,
# found by iterative magnitude pruning; with one mask as dense as the tickets' union; and a network per route.
DENSE, SINGLE, SINGLE_UNION, MULTIPLE = "dense", "IMP single", "IMP single, union", "IMP multiple"


def file_name(title: str) -> str:
    """The title of a method as a name of a file or folder."""
    return title.replace(",", "").replace(" ", "-")


class SeedRuns(ABC):
    """
    The runs of several methods with one seed.

    Every method has a folder of its name. Its run is trained at its first use, or read back from the folder if it was
    trained before. A command's subclass makes the trainer of a method.

    Args:
        folder (`Path`): the parent of the methods' folders.
        args ([`RTLTrainingArguments`]): the arguments that all methods share.
    """

    # The method whose tickets the others are compared with.
    tickets: str
    # The keys of a round's report that results leave out.
    left_out: tuple[str, ...] = ("log_history",)

    def __init__(self, folder: Path, args: RTLTrainingArguments) -> None:
        self.folder, self.args = folder, args
        self._trained: dict[str, RTLTrainer] = {}

    @abstractmethod
    def trainer(self, method: str) -> RTLTrainer:
        """The trainer of a method before its training."""

    def trained(self, method: str) -> RTLTrainer:
        """The trainer of a method after its training."""
        if method not in self._trained:
            trainer = self.trainer(method)
            trainer.train()
            self._trained[method] = trainer
        return self._trained[method]

    def arguments(self, method: str, **changed: Any) -> RTLTrainingArguments:
        """The arguments of a method: `args` with its output folder and the changes."""
        return replace(self.args, output_dir=str(self.folder / file_name(method)), **changed)

    @cached_property
    def num_weights(self) -> int:
        """The number of prunable weights of the network."""
        return self.trainer(self.tickets).model.mask_bank.num_weights

    def sparsities(self, method: str) -> list[float]:
        """The sparsity of a method's masks in every round. A dense network has a single round, at sparsity 0."""
        if method == DENSE:
            return [0.0]
        if method == SINGLE_UNION:
            return [1 - report["union"] / self.num_weights for report in self.trained(self.tickets).rounds]
        return list(self.args.target_sparsity)

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """
        The report of every round of a method. It has `at`, the sparsity of the tickets to compare it with, and
        `costs`, the number of trainings and samples until the end of the round.
        """
        trainer = self.trained(method)
        plan, num_events = trainer.plan(), 0
        at = [0.0] if method == DENSE else self.args.target_sparsity
        for report, round_, tickets_at in zip(trainer.rounds, plan.rounds, at, strict=True):
            num_events += len(round_.kept)
            yield {
                **{name: value for name, value in report.items() if name not in self.left_out},
                "at": tickets_at,
                "costs": {
                    "trainings": num_events * trainer.model.num_routes + 1,
                    "samples in extraction": num_events * sum(plan.extraction_steps) * self.args.route_batch_size,
                    "samples in retraining": plan.retraining_steps * self.args.route_batch_size,
                },
            }

    def all_reports(self, methods: Sequence[str]) -> list[dict[str, Any]]:
        """The reports of several methods, each with its `method`."""
        return [{"method": method, **report} for method in methods for report in self.reports(method)]

    def measured(self, method: str, at: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `measure` for a method without a run; read back if it was measured before."""
        file = self.folder / file_name(method) / f"sparsity-{at:g}.json"
        if not file.exists():
            content = measure()
            file.parent.mkdir(exist_ok=True)
            write_json(file, content)
        return json.loads(file.read_text())


def independent_costs(report: dict[str, Any], **spent: float) -> dict[str, Any]:
    """The sizes and costs of a separate network per route, each with its ticket of a report. `spent`: other costs."""
    trainings = report["costs"]["trainings"] - 1 + len(report["kept"])
    return {
        "union": sum(report["kept"].values()),
        "footprint": {"total_bytes": report["footprint"]["independent_bytes"]},
        "emptied_layers": report["emptied_layers"],
        "costs": {**report["costs"], "trainings": trainings, **spent},
    }
