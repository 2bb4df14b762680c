"""
SIGKILL at many points of a run. The continued run ends as an uninterrupted one, byte for byte, and does nothing again
that was finished.

`make test-long` kills at all points, the ordinary suite at a few.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.distributed.kill_points import (
    EXTRACTION,
    NUM_STEPS,
    OPTIONS,
    PHASES,
    SAVING,
    WRITING,
    Point,
    StoppedRun,
)
from tests.distributed.processes import Team


PATIENCE = 3.0  # seconds that a process waits for one that has been killed
ENDED_WITHIN = 30.0  # seconds after which it must have ended

# The number of kills in each phase of a run, by network (batch norm, layer norm) and number of processes.
NUM_KILLS = {("timm", 1): 6, ("timm", 2): 6, ("vit", 1): 2, ("vit", 2): 2}


@dataclass(frozen=True)
class Kill:
    """
    Args:
        kind (`str`): the `kind` of `make_model`.
        world_size (`int`): number of processes.
        phase (`str`): the phase of the run in which it is killed.
        number (`int`): the index among the `NUM_KILLS` of this phase, which are spread over the whole run.
        alone (`str`): `"it"` if only the process that has reached the point is killed, `"other"` if only the other
            one, `""` if all are.
        again (`str`): where the continued run is killed: at the `"same"` point, at a `"later"` one of another phase,
            or, if empty, nowhere.
        name (`str`): the name of the point, which replaces `number`.
    """

    kind: str
    world_size: int
    phase: str
    number: int = 0
    alone: str = ""
    again: str = ""
    name: str = ""

    def __str__(self) -> str:
        alone = f"{self.alone} alone" if self.alone else ""
        again = f"then {self.again}" if self.again else ""
        words = (self.kind, f"world {self.world_size}", self.phase, self.name or str(self.number), alone, again)
        return "-".join(word.replace(" ", "_") for word in words if word)


def make_kills() -> list[Kill]:
    kills = []
    for (kind, world_size), number_of_kills in NUM_KILLS.items():
        for phase in PHASES:
            for number in range(number_of_kills):
                alone = ("", "it", "it", "", "other", "other")[number] if world_size > 1 else ""
                # Only the first half of a phase's points lies before the second round, in which "later" is.
                again = ("same", "", "later")[number % 3] if number < number_of_kills / 2 else ""
                # The continued run passes a point again, unless it is a save or the other process went on.
                again = "later" if again and (phase == SAVING or alone) else again
                kills.append(Kill(kind, world_size, phase, number, alone, again))
    return kills


# Points at which finished files lie beside unfinished ones. Spread points may miss them.
DELICATE = [
    Kill("timm", 1, WRITING, name="run.json is half written"),
    Kill("timm", 1, WRITING, name="extraction/extraction.json is half written"),
    Kill("timm", 1, WRITING, name="extraction/event-000/route-001.safetensors is half written", again="same"),
    Kill("timm", 1, WRITING, name="round-01-sparsity-0.3/checkpoint-2/model.safetensors is half written"),
    Kill("timm", 1, SAVING, name="round-01-sparsity-0.3/checkpoint-4/checkpoint.json has its name"),
    Kill("timm", 1, SAVING, name="round-01-sparsity-0.3/checkpoint-2 is half removed"),
    Kill("timm", 1, SAVING, name="round-01-sparsity-0.3/retrained.json has its name", again="later"),
    Kill("timm", 1, SAVING, name="round-01-sparsity-0.3/round.json has its name"),
    Kill("timm", 1, WRITING, name="round-02-sparsity-0.6/round.json is written under another name"),
    Kill("timm", 1, SAVING, name="final/model.safetensors has its name"),
    Kill("timm", 1, WRITING, name="final/training_args.json is half written"),
    Kill("timm", 1, SAVING, name="final/training_args.json has its name"),
    Kill("timm", 1, SAVING, name="final/training_run.json has its name"),
    Kill("timm", 1, WRITING, name="final/README.md is written under another name"),
]
KILLS = make_kills() + DELICATE
# These cover each phase, one process and two, all processes and one alone, and killing once and twice.
IN_SHORT_FORM = {
    "timm-world_1-inside_a_file_write-extraction/event-000/route-001.safetensors_is_half_written-then_same",
    "timm-world_1-inside_a_file_write-round-01-sparsity-0.3/checkpoint-2/model.safetensors_is_half_written",
    "timm-world_1-saving-round-01-sparsity-0.3/checkpoint-2_is_half_removed",
    "timm-world_2-extraction-1-it_alone",
    "timm-world_2-joint_retraining-4-other_alone",
    "timm-world_1-between_the_phases-3",
}


@dataclass(frozen=True)
class Reference:
    """The files of an uninterrupted run, and the points that it passed."""

    content: dict[str, bytes | None]
    points: list[Point]

    def first_target(self, kill: Kill) -> Point:
        """A point of the phase, spread by `number`, on the processes in turn; kinds of runs get other points."""
        if kill.name:
            return Point(0, kill.phase, kill.name)
        kind = (kill.kind, kill.world_size)
        rank = kill.number % kill.world_size
        points = [point for point in self.points if (point.phase, point.rank) == (kill.phase, rank)]
        # At even distances, all kills would hit the same kind of point. These distances hit the most kinds.
        within = (0.35 * kill.number + 0.1 * list(NUM_KILLS).index(kind)) % 1
        return points[int((kill.number + within) / NUM_KILLS[kind] * len(points))]

    def second_target(self, kill: Kill) -> Point:
        """The same point, or one of the second round in another phase."""
        first = self.first_target(kill)
        if kill.again == "same":
            return first
        own = [point for point in self.points if point.rank == first.rank]
        begin = next(index for index, point in enumerate(own) if point.name.startswith("round-02"))
        phase = PHASES[(PHASES.index(kill.phase) + 1 + kill.number) % len(PHASES)]
        points = [point for point in own[begin:] if point.phase == phase]
        return points[(7 * kill.number + 3) % len(points)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Callable[[str, int], Reference]:
    @functools.cache
    def made(kind: str, world_size: int) -> Reference:
        folder = tmp_path_factory.mktemp(f"whole-{kind}-{world_size}")
        arguments = (str(folder / "plain"), kind, OPTIONS)
        plain = Team(runs.train, arguments, world_size=world_size, logs=folder / "logs-plain")
        run = StoppedRun(folder / "stopped", kind, world_size, folder / "logs-stopped")
        run.follow()
        assert run.team.results() == [world_size] * world_size
        plain.results()
        assert len(set(run.points)) == len(run.points), "two points of one name"
        content = contents(folder / "plain")
        # Stopping at points must not change a run.
        assert differing(contents(folder / "stopped"), content) == []
        shutil.rmtree(folder)
        return Reference(content, run.points)

    return made


@pytest.fixture(scope="module")
def killed() -> list[tuple[Kill, list[Point]]]:
    """Collects the kills that happened, each with the points of its run."""
    return []


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path -> content of everything in a folder; `None` for folders."""
    paths = list(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def differing(one: dict[str, bytes | None], other: dict[str, bytes | None]) -> list[str]:
    """The paths that one of the two lacks, or whose bytes differ; times in reports do not count."""
    return [
        path
        for path in sorted({*one, *other})
        if path not in one or path not in other or not _same(path, one[path], other[path])
    ]


def _same(path: str, one: bytes | None, other: bytes | None) -> bool:
    if one is None or other is None or not path.endswith("round.json"):
        return one == other
    return _timeless(json.loads(one)) == _timeless(json.loads(other))


def _timeless(report: dict) -> dict:
    """Without times, and the mean loss, which `Trainer` takes over the steps since it was continued."""
    timeless = {**report, "seconds": None, "train_loss": None, "metrics": _without_times(report["metrics"])}
    return {**timeless, "log_history": [_without_times(logged) for logged in report["log_history"]]}


def _unevaluated(report: dict) -> dict:
    """The report of a round as it is before the round is evaluated."""
    kept = [logged for logged in report["log_history"] if not any(name.startswith("eval_") for name in logged)]
    left = {name: value for name, value in report.items() if name != "evaluation"}
    return _timeless({**left, "metrics": {}, "log_history": kept})


def _without_times(values: dict) -> dict:
    changing = ("_runtime", "_per_second", "train_loss")
    return {name: value for name, value in values.items() if not name.endswith(changing)}


def check_every_name_is_true(folder: Path, whole: dict[str, bytes | None]) -> None:
    """Checks that every file under its final name is whole. Checkpoints, which are sealed instead, are skipped."""
    for path, content in contents(folder).items():
        hidden_or_sealed = any(part.startswith((".", "checkpoint-")) for part in Path(path).parts)
        if path.endswith("/retrained.json"):
            finished = json.loads(whole[path.replace("retrained.json", "round.json")])
            assert _unevaluated(json.loads(content)) == _unevaluated(finished), f"{path} is not whole after a kill"
        # Trainer writes training_args.bin in place, and hf_rtl removes it.
        elif not hidden_or_sealed and not path.endswith("training_args.bin"):
            assert path in whole and _same(path, content, whole[path]), f"{path} is not whole after a kill"


@dataclass
class Finished:
    """The finished work of a run on disk, which must not be done again."""

    folder: Path

    def __post_init__(self) -> None:
        files = [file for file in self.folder.glob("extraction/event-*/*") if not file.name.startswith(".")]
        self.masks = {str(file.relative_to(self.folder)): _identity(file) for file in files}
        self.rounds = {file.parent.name: _identity(file) for file in self.folder.glob("round-*/round.json")}
        self.steps: dict[str, int] = {}
        for seal in self.folder.glob("round-*/checkpoint-*/checkpoint.json"):
            round_, step = seal.parent.parent.name, int(seal.parent.name.split("-")[1])
            self.steps[round_] = max(step, self.steps.get(round_, 0))

    def check_not_done_again(self, points: list[Point], whole: Reference) -> None:
        """Checks by the points that the continued run passed that it did nothing finished again."""
        trained = {point.name.split(" ")[0] for point in points if point.phase == EXTRACTION}
        assert not trained & set(self.masks)
        for mask, identity in self.masks.items():
            assert _identity(self.folder / mask) == identity, f"{mask} was written again"
        for round_, identity in self.rounds.items():
            assert _identity(self.folder / round_ / "round.json") == identity, f"{round_} was done again"
        for round_ in {path.split("/")[0] for path in whole.content if path.startswith("round-")}:
            first = NUM_STEPS if round_ in self.rounds else self.steps.get(round_, 0)
            expected = [f"{round_} step {step} begins" for step in range(first, NUM_STEPS)]
            for rank in {point.rank for point in points}:
                done = [p.name for p in points if p.rank == rank and p.name.startswith(round_)]
                begun = [name for name in done if name.endswith(" begins")]
                assert begun == expected[: len(begun)]

    def check_rest_was_done(self, points: list[Point], whole: Reference) -> None:
        """Checks that a continued run that has ended did all missing extraction, and nothing more."""
        trained = [p.name.split(" ")[0] for p in points if p.phase == EXTRACTION and p.name.endswith("step 0 begins")]
        missing = [p for p in whole.content if p.startswith("extraction/event-") and p.endswith(".safetensors")]
        assert sorted(trained) == sorted(set(missing) - set(self.masks))


def _identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.parametrize(
    "kill",
    [pytest.param(kill, id=str(kill), marks=[] if str(kill) in IN_SHORT_FORM else pytest.mark.long) for kill in KILLS],
)
@pytest.mark.slow
def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path, reference, killed, kill):
    whole = reference(kill.kind, kill.world_size)
    targets = [whole.first_target(kill)] + ([whole.second_target(kill)] if kill.again else [])
    folder = tmp_path / "run"
    everyone = list(range(kill.world_size))
    for number, target in enumerate(targets):
        victims = {"": everyone, "it": [target.rank], "other": [1 - target.rank]}[kill.alone]
        patience = PATIENCE if kill.alone else 30.0
        before = Finished(folder)
        run = StoppedRun(folder, kill.kind, kill.world_size, tmp_path / f"logs-{number}", patience=patience)
        assert run.follow(target), f"the run has ended without coming to {target}:\n{run.team.output()}"
        seconds = run.kill(victims)
        print(f"{kill}: {target}, killed {victims}, all have ended after {seconds:.1f} s")
        assert seconds < ENDED_WITHIN
        before.check_not_done_again(run.points, whole)
        check_every_name_is_true(folder, whole.content)
    before = Finished(folder)
    run = StoppedRun(folder, kill.kind, kill.world_size, tmp_path / "logs-continued")
    run.follow()
    assert run.team.results() == [kill.world_size] * kill.world_size
    before.check_not_done_again(run.points, whole)
    before.check_rest_was_done(run.points, whole)
    assert differing(contents(folder), whole.content) == []
    killed.append((kill, targets))
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["timm", pytest.param("vit", marks=pytest.mark.long)])
@pytest.mark.slow
def test_masks_to_compare_with_do_not_depend_on_the_number_of_processes(reference, kind):
    one, two = (reference(kind, world_size).content for world_size in (1, 2))
    masks = [path for path in one if path.startswith("extraction/")]
    assert len(masks) > 9 and all(one[path] == two[path] for path in masks)


def test_kills_are_spread_over_the_phases(killed, say):
    """Shows the kills of this session; a kill that did not happen has failed above."""
    columns = list(NUM_KILLS)
    count = Counter((target.phase, kill.kind, kill.world_size) for kill, targets in killed for target in targets)
    rows = [["killed", *(f"{kind}, world {world_size}" for kind, world_size in columns), "all"]]
    for phase in PHASES:
        numbers = [count[(phase, *column)] for column in columns]
        rows.append([phase, *numbers, sum(numbers)])
    for name, *cells in rows:
        say(f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells))
    twice = sum(len(targets) > 1 for _, targets in killed)
    alone = sum(len(targets) for kill, targets in killed if kill.alone)
    say(f"{sum(count.values())} kills of {len(killed)} runs: {twice} runs twice, {alone} kills of one rank alone")
    planned = Counter(kill.phase for kill in KILLS)
    assert len(KILLS) >= 30 and all(planned[phase] >= 6 for phase in PHASES)
    assert {str(kill) for kill in KILLS} >= IN_SHORT_FORM
