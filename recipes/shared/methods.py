"""Several methods with several seeds on the same data: a run for each, trained once and read back afterwards."""

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


# What tickets are compared with, whatever the data: one network for all routes, not pruned; with one mask of the
# tickets' density, by iterative magnitude pruning; with one of the density of their union; a network per route.
DENSE, SINGLE, SINGLE_UNION, MULTIPLE = "dense", "IMP single", "IMP single, union", "IMP multiple"


def file_name(title: str) -> str:
    """The name of a method, or of what it gave, as files and folders have it."""
    return title.replace(",", "").replace(" ", "-")


class SeedRuns(ABC):
    """
    The runs of several methods with one seed.

    Every method has a folder of its name. Its run is trained when it is first asked for; if it was trained before, it
    is read back from there. A command says in a subclass how the trainer of a method is made.

    Args:
        folder (`Path`): where the folders of the methods are.
        args ([`RTLTrainingArguments`]): what all methods have in common.
    """

    # The method whose tickets the others are compared with.
    tickets: str
    # What results leave out of the reports of rounds.
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
        """The arguments of a method, with its folder for output."""
        return replace(self.args, output_dir=str(self.folder / file_name(method)), **changed)

    @cached_property
    def num_weights(self) -> int:
        """How many prunable weights the network has."""
        return self.trainer(self.tickets).model.mask_bank.num_weights

    def sparsities(self, method: str) -> list[float]:
        """The sparsity of a method's own masks in every round; a dense network has one round, that prunes nothing."""
        if method == DENSE:
            return [0.0]
        if method == SINGLE_UNION:
            return [1 - report["union"] / self.num_weights for report in self.trained(self.tickets).rounds]
        return list(self.args.target_sparsity)

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """
        The report of every round of a method, with `at`, the sparsity of the tickets that it is to be compared with,
        and `costs`, what was spent until the end of the round.
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
        """What `measure` gives for a method that is no run; read back if it was measured before."""
        file = self.folder / file_name(method) / f"sparsity-{at:g}.json"
        if not file.exists():
            content = measure()
            file.parent.mkdir(exist_ok=True)
            write_json(file, content)
        return json.loads(file.read_text())
