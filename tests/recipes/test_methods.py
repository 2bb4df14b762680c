"""The runs of several methods with one seed: which are trained, when, and their reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_rtl import RTLTrainingArguments
from shared.methods import DENSE, SINGLE, SINGLE_UNION, SeedRuns, file_name


class CountedTrainer:
    """Stands for a trainer with two events per round; the union of its tickets has 60 of 100 weights, then 40."""

    def __init__(self, args: RTLTrainingArguments, log: list[str]) -> None:
        self.args, self._log, self.rounds = args, log, []
        self.model = SimpleNamespace(num_routes=3, mask_bank=SimpleNamespace(num_weights=100))

    def train(self) -> None:
        self._log.append(Path(self.args.output_dir).name)
        self.rounds = [{"union": union, "log_history": []} for union in (60, 40)[: len(self.args.target_sparsity)]]

    def plan(self) -> Any:
        rounds = [SimpleNamespace(kept=[1, 1]) for _ in self.args.target_sparsity]
        return SimpleNamespace(rounds=rounds, extraction_steps=[4, 5, 6], retraining_steps=7)


class CountedRuns(SeedRuns):
    tickets = "RTL, own"

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        args = RTLTrainingArguments(output_dir=str(folder), target_sparsity=[0.5, 0.75], route_batch_size=10)
        super().__init__(folder, args)

    def trainer(self, method: str) -> Any:
        return CountedTrainer(self.arguments(method, target_sparsity=self.sparsities(method)), self.log)


def test_a_method_is_trained_once_at_its_first_use(tmp_path: Path) -> None:
    runs = CountedRuns(tmp_path)
    assert runs.num_weights == 100 and runs.log == []
    assert [runs.trained(SINGLE) is runs.trained(SINGLE), runs.log] == [True, ["IMP-single"]]
    # The union of the tickets needs their run first.
    reports = list(runs.reports(SINGLE_UNION))
    assert runs.log == ["IMP-single", "RTL-own", "IMP-single-union"]
    assert runs.trained(SINGLE_UNION).args.target_sparsity == pytest.approx([0.4, 0.6])
    assert [report["at"] for report in reports] == [0.5, 0.75]
    assert runs.arguments("RTL, own").output_dir == str(tmp_path / file_name("RTL, own"))


def test_reports_say_what_was_spent_until_then(tmp_path: Path) -> None:
    runs = CountedRuns(tmp_path)
    costs = [{"trainings": 2 * events * 3 + 1, "samples in extraction": 2 * events * 150} for events in (1, 2)]
    assert list(runs.reports(SINGLE)) == [
        {"union": union, "at": at, "costs": {**spent, "samples in retraining": 70}}
        for union, at, spent in zip((60, 40), (0.5, 0.75), costs, strict=True)
    ]
    assert [(report["method"], report["at"]) for report in runs.all_reports([DENSE, SINGLE])] == [
        (DENSE, 0.0),
        (SINGLE, 0.5),
        (SINGLE, 0.75),
    ]


def test_measurements_are_read_back(tmp_path: Path) -> None:
    runs = CountedRuns(tmp_path)
    assert runs.measured("IMP multiple", 0.5, lambda: {"accuracy": 0.25}) == {"accuracy": 0.25}
    assert runs.measured("IMP multiple", 0.5, lambda: pytest.fail("measured again")) == {"accuracy": 0.25}
    assert (tmp_path / "IMP-multiple" / "sparsity-0.5.json").exists()
