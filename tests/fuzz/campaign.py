"""Many cases of a kind, drawn by hypothesis, each read in a worker process; findings are made small."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from tests.child_processes import fork
from tests.fuzz.mutations import cases
from tests.fuzz.worker import MOST_SECONDS, serve


OUTCOMES = ("refused", "loaded", "answers not", "found")
# Shares of the kinds in all cases.
SHARES = {"config": 25, "weights": 20, "tickets": 20, "rules": 10, "run": 15, "card": 10}


class Worker:
    """
    A process for cases, started anew when it has died.

    Args:
        seeds (`Path`): whole folders of all kinds.
        folder (`Path`): for its files.
    """

    def __init__(self, seeds: Path, folder: Path) -> None:
        self.seeds, self.folder = seeds, folder
        folder.mkdir()
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._log = self.folder / "log"
        self._log.unlink(missing_ok=True)
        self._process = fork(serve, theirs, self.seeds, self.folder / "work", output=self._log)
        theirs.close()
        if not self._connection.poll(120) or self._connection.recv() != "ready":
            raise RuntimeError(f"a worker does not start: {self._log.read_text()[-3000:]}")

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """What comes of a case. A worker that dies, or takes too long, is a finding."""
        try:
            self._connection.send(case)
            if self._connection.poll(12 * MOST_SECONDS):
                return self._connection.recv()
        except (EOFError, OSError):
            pass
        self._process.join(5)
        code = self._process.exitcode
        self.end()
        log = self._log.read_text(errors="replace")
        lines = [line.strip() for line in log.splitlines() if "/hf_rtl/" in line]
        what = f"takes more than {MOST_SECONDS} s" if code in (None, -signal.SIGPROF) else f"dies ({code})"
        self._start()
        where = f"{what}, in {lines[0] if lines else 'the libraries'}"
        return {"came": "found", "died": True, "done": [], "signature": where, "detail": log[-3000:]}

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(1)
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def worker(seeds: Path) -> Iterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        made = Worker(seeds, Path(folder, "worker"))
        try:
            yield made
        finally:
            made.end()


@dataclass
class Results:
    """What came of the cases of a kind: counts, and the smallest case of every finding, by its signature."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)


def fuzz(kind: str, number: int, seed: int, worker: Worker) -> Results:
    """Reads `number` cases of a kind. With equal arguments the cases are the same."""
    results, turn = Results(kind), 0
    while (left := number - results.counts.total()) > 0:
        turn += 1
        _search(results, left, 1000 * seed + turn, worker)
    return results


def _search(results: Results, number: int, seed: int, worker: Worker) -> None:
    """Reads `number` cases, or less if one is a new finding: hypothesis makes that smaller, which is not counted."""
    small: list[tuple[dict[str, Any], dict[str, Any]]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(cases(results.kind))
    def check(case: dict[str, Any]) -> None:
        verdict = worker.ask(case)
        if not small:
            results.counts[verdict["came"]] += 1
        is_new = verdict["came"] == "found" and verdict["signature"] not in results.findings
        if is_new and verdict.get("died"):  # too slow to be made small
            results.findings[verdict["signature"]] = case, verdict
            return
        if is_new and (not small or small[0][1]["signature"] == verdict["signature"]):
            small[:] = [(case, verdict)]
            raise AssertionError(verdict["signature"])

    with contextlib.suppress(AssertionError, hypothesis.errors.Flaky):
        check()
    if small:
        results.findings[small[0][1]["signature"]] = small[0]


def in_words(case: dict[str, Any], verdict: dict[str, Any], seed: int) -> str:
    """A finding, and the command that repeats it."""
    lines = [f"found in {case['kind']} (seed {seed}): {verdict['signature']}"]
    lines += [f"  {done}" for done in verdict["done"]]
    lines += ["  " + line for line in verdict["detail"].splitlines()]
    return "\n".join([*lines, f"  again: python -m tests.fuzz --repeat {shlex.quote(json.dumps(case))}"])
