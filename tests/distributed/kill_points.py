"""Runs that stop at every point at which they can be killed, and a class that lets them go on or kills them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from transformers import PreTrainedConfig, TrainerCallback, TrainerState

import hf_rtl.modeling.files
import hf_rtl.training.processes
import hf_rtl.training.route_trainer
import hf_rtl.training.trainer
from hf_rtl import RTLTrainer
from hf_rtl.training.extraction import Extraction
from hf_rtl.training.run_directory import RunDirectory
from hf_rtl.training.ticket_trainer import TicketTrainer
from tests.distributed import runs
from tests.distributed.processes import Team


PHASES = EXTRACTION, WRITING, BETWEEN, RETRAINING, SAVING = (
    "extraction",
    "inside a file write",
    "between the phases",
    "joint retraining",
    "saving",
)
NUM_STEPS = 4  # steps of joint retraining, with a checkpoint after every second one
OPTIONS = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 2, "card": True}


@dataclass(frozen=True)
class Point:
    """A moment of a run, which comes once at most: the process, and what it is about to do or has just done."""

    rank: int
    phase: str
    name: str


# In the processes that are killed


class Stops:
    """
    Makes this process stop at every point of a run.

    Args:
        folder (`Path`): the folder of the run; the process does not stop at writes elsewhere.
        connection (`Connection`): sends points, and receives the permission to go on.
    """

    def __init__(self, folder: Path, connection: Connection) -> None:
        self.folder = folder
        self.connection = connection
        self.trainer: RTLTrainer | None = None
        self._mask = ""
        self._num_steps = 0

    def stop(self, phase: str, name: str) -> None:
        self.connection.send((phase, name))
        self.connection.recv()

    def install(self) -> None:
        """Patches what a run calls, without a way back: the process does nothing but this run."""
        self._stop_in_extraction()
        for owner, name, number in (
            (Path, "write_text", 0),
            (hf_rtl.modeling.files, "save_file", 1),
            (transformers.modeling_utils, "safe_save_file", 1),
            (torch, "save", 1),
            (TrainerState, "save_to_json", 1),
            (PreTrainedConfig, "to_json_file", 1),
        ):
            self._stop_in_writes(owner, name, number)
        self._stop_at_renames()
        self._stop_in_removals()
        self._stop_before(hf_rtl.training.processes, "appears", BETWEEN)
        self._stop_before(RunDirectory, "open", BETWEEN)
        self._stop_before(hf_rtl.training.trainer, "find_theta0", BETWEEN)
        self._stop_before(Extraction, "run", BETWEEN)
        self._stop_before(Extraction, "exchange", BETWEEN)
        self._stop_before(RTLTrainer, "put_masks", BETWEEN)
        self._stop_before(RTLTrainer, "start_from", BETWEEN)
        self._stop_before(RTLTrainer, "retrain_jointly", BETWEEN)
        self._stop_before(RTLTrainer, "recalibrate", BETWEEN)
        self._stop_before(RTLTrainer, "evaluate", BETWEEN)
        self._stop_before(RTLTrainer, "_save_checkpoint", SAVING)
        self._stop_before(RTLTrainer, "_save_optimizer_and_scheduler", SAVING)
        self._stop_before(RTLTrainer, "save_model", SAVING)
        self._stop_before(hf_rtl.training.route_trainer, "mark_complete", SAVING)
        self._stop_before(RunDirectory, "mark_retrained", SAVING)
        self._stop_before(RunDirectory, "write_report", SAVING)
        self._stop_before(hf_rtl.training.processes.Heartbeat, "leave", SAVING)

    def watch(self, trainer: RTLTrainer) -> None:
        """Stops in joint retraining."""
        self.trainer = trainer
        original = trainer.training_step

        def training_step(*arguments: Any, **keywords: Any) -> Any:
            self.stop(RETRAINING, self._step("begins"))
            loss = original(*arguments, **keywords)
            self.stop(RETRAINING, self._step("has gradients"))
            return loss

        class AfterUpdate(TrainerCallback):
            def on_optimizer_step(callback, *arguments: Any, **keywords: Any) -> None:
                self.stop(RETRAINING, self._step("has changed the weights"))

        trainer.training_step = training_step
        trainer.add_callback(AfterUpdate())

    def _step(self, what: str) -> str:
        return f"{self._round()} step {self.trainer.state.global_step} {what}"

    def _round(self) -> str:
        started = self.trainer is not None and self.trainer.current_round is not None
        return self.trainer.current_round.name if started else "run"

    def _wrap(self, owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(make(original)))

    def _stop_before(self, owner: Any, name: str, phase: str) -> None:
        def make(original):
            def called(*arguments, **keywords):
                # The path or the step tells a call from the other calls in a round.
                about = "".join(f" {self._shown(argument)}" for argument in arguments if self._is_ours(argument))
                step = f" step {self.trainer.state.global_step}" if phase == SAVING and self._round() != "run" else ""
                self.stop(phase, f"{self._round()}{step}: {name}{about}")
                return original(*arguments, **keywords)

            return called

        self._wrap(owner, name, make)

    def _stop_in_extraction(self) -> None:
        def train_and_prune(original):
            def called(extraction, route, event, *arguments):
                self._mask = self._shown(extraction.run_directory.mask_file(event, route))
                self._num_steps = 0
                pruned = original(extraction, route, event, *arguments)
                self.stop(EXTRACTION, f"{self._mask} is found")
                return pruned

            return called

        def step(original):
            def called(*arguments):
                self.stop(EXTRACTION, f"{self._mask} step {self._num_steps} begins")
                loss = original(*arguments)
                self.stop(EXTRACTION, f"{self._mask} step {self._num_steps} ends")
                self._num_steps += 1
                return loss

            return called

        self._wrap(Extraction, "train_and_prune", train_and_prune)
        self._wrap(TicketTrainer, "step", step)

    def _stop_in_writes(self, owner: Any, name: str, number: int) -> None:
        """Stops with the file that an interrupted write leaves: it is empty, or half written."""

        def make(original):
            def called(*arguments, **keywords):
                result = original(*arguments, **keywords)
                if self._is_ours(arguments[number]):
                    file = Path(arguments[number])
                    content = file.read_bytes()
                    file.write_bytes(b"")
                    self.stop(WRITING, f"{self._shown(file)} is begun")
                    file.write_bytes(content[: len(content) // 2])
                    self.stop(WRITING, f"{self._shown(file)} is half written")
                    file.write_bytes(content)
                return result

            return called

        self._wrap(owner, name, make)

    def _stop_at_renames(self) -> None:
        def make(original):
            def called(source, target):
                if self._is_ours(target):
                    # A file is written under another name and renamed; a model's files are moved one by one.
                    phase = WRITING if str(source).endswith(".tmp") else SAVING
                    self.stop(phase, f"{self._shown(target)} is written under another name")
                original(source, target)
                if self._is_ours(target):
                    self.stop(SAVING, f"{self._shown(target)} has its name")

            return called

        self._wrap(os, "replace", make)

    def _stop_in_removals(self) -> None:
        def make(original):
            def called(folder, *arguments, **keywords):
                files = sorted(Path(folder).iterdir(), reverse=True)  # the seal stays
                if self._is_ours(folder) and files:
                    for file in files[: len(files) // 2]:
                        file.unlink()
                    self.stop(SAVING, f"{self._shown(folder)} is half removed")
                original(folder, *arguments, **keywords)

            return called

        self._wrap(shutil, "rmtree", make)

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, (str, Path)) and Path(path).is_relative_to(self.folder)

    def _shown(self, path: str | Path) -> str:
        """A path inside the folder; a temporary name without the part that differs between runs."""
        parts = Path(path).relative_to(self.folder).parts
        temporary = r"^\.(.+)(\.([0-9a-f]{8}-)?[0-9a-f]+|-[a-z0-9_]{8})\.tmp$"
        return "/".join(re.sub(temporary, r"\1", part) for part in parts)


def train(folder: str, kind: str, ends: list[Connection], resume: bool | None, patience: float) -> int:
    """A whole run that stops at every point. Returns the number of processes that took part."""
    rank = int(os.environ.get("RANK", 0))
    for other, end in enumerate(ends):
        if other != rank:
            end.close()
    hf_rtl.training.processes.PATIENCE = patience
    hf_rtl.training.processes.INTERVAL = 0.2
    stops = Stops(Path(folder), ends[rank])
    stops.install()
    trainer = runs.make_trainer(folder, kind, **OPTIONS)
    stops.watch(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return runs.summary(trainer)["world_size"]


# In the test


class StoppedRun:
    """
    Starts or continues the run in `folder`, and follows it from point to point.

    Args:
        folder (`Path`): the folder of the run.
        kind (`str`): the `kind` of `make_model`.
        world_size (`int`): number of processes.
        logs (`Path`): the folder of the processes' output.
        patience (`float`): seconds after which a silent process counts as gone.
    """

    def __init__(self, folder: Path, kind: str, world_size: int, logs: Path, *, patience: float = 30) -> None:
        resume = True if (folder / "run.json").exists() else None
        pipes = [Pipe() for _ in range(world_size)]
        ends = [theirs for _, theirs in pipes]
        arguments = (str(folder), kind, ends, resume, patience)
        self.team = Team(train, arguments, world_size=world_size, logs=logs)
        for theirs in ends:
            theirs.close()
        self.points: list[Point] = []
        self._ranks = {ours: rank for rank, (ours, _) in enumerate(pipes)}

    def follow(self, target: Point | None = None) -> bool:
        """
        Lets the processes go on until one has reached `target`, where it stays, or all have ended. Returns whether one
        has reached it.
        """
        while self._ranks:
            ready = wait(list(self._ranks), timeout=120)
            if not ready:
                self.team.kill()
                raise TimeoutError(f"no process has come to a point for long:\n{self.team.output()}")
            for connection in ready:
                try:
                    self.points.append(Point(self._ranks[connection], *connection.recv()))
                    if self.points[-1] == target:
                        return True
                    connection.send(None)
                except (EOFError, ConnectionError):  # the process has ended
                    del self._ranks[connection]
        return False

    def kill(self, ranks: list[int]) -> float:
        """Sends SIGKILL to some processes, and waits until all have ended. Returns the seconds that this took."""
        begin = time.monotonic()
        self.team.kill(ranks)
        for connection, rank in self._ranks.items():
            if rank not in ranks and self.points[-1].rank == rank:
                connection.send(None)
        self.follow()
        codes = self.team.wait(60)
        expected = [-9 if rank in ranks else 1 for rank in range(len(codes))]
        assert codes == expected, (codes, self.team.output())
        return time.monotonic() - begin
