"""Communication between the processes of a run outside of training steps: checks, masks and signs of life."""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor


# Seconds to wait for a file that another machine wrote: network file systems cache the content of a folder.
SHARED_FOLDER_PATIENCE = 60.0


class Processes:
    """The processes of a run, seen from one of them. All processes must call each method; properties are local."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        return gather_object([value])

    def from_rank_zero(self, value: Any) -> Any:
        """The value of process 0."""
        return broadcast_object_list([value])[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        return self._accelerator.reduce(values.to(self._accelerator.device), "sum").cpu()

    def check_same(self, values: Mapping[str, Any]) -> None:
        """
        Raises:
            RuntimeError: a process has other `values` than process 0; names the first such process and the values.
        """
        everyone = self.gather({name: value for name, value in values.items()})
        for rank, theirs in enumerate(everyone):
            differing = [name for name in values if theirs[name] != everyone[0][name]]
            if differing:
                listed = "; ".join(f"{name}: {everyone[0][name]} and {theirs[name]}" for name in differing)
                raise RuntimeError(
                    f"processes 0 and {rank} would not find the same tickets: they differ in {listed}. Start all with "
                    "the same arguments, data and versions, on the same kind of device."
                )

    def check_shared(self, folders: Sequence[Path], owner: str) -> None:
        """
        Checks that process 0 can write into `folders`, and that all other processes see its file. Creates missing
        folders. `owner` is part of the file's name.

        Raises:
            OSError: process 0 cannot write.
            RuntimeError: another machine has a different folder of that name.
        """
        for folder in folders:
            token = folder / self.from_rank_zero(f".shared.{owner}{secrets.token_hex(8)}.tmp")
            if self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                token.touch()
            self.wait()
            name = f"{self.rank} on {socket.gethostname()}"
            blind = [process for process in self.gather(None if appears(token) else name) if process]
            if self.rank == 0:
                token.unlink()
            if blind:
                raise RuntimeError(
                    f"process {', '.join(blind)} does not see the file that process 0 wrote into "
                    f"{str(folder)!r}. With several machines, `output_dir` and `extraction_dir` must be on a disk "
                    "that all of them share, under the same path."
                )

    def merge_routes(self, own: Mapping[int, Tensor], num_routes: int, num_bytes: int) -> Tensor:
        """
        Merges the packed masks that the processes hold into those of all routes.

        Args:
            own (`Mapping[int, Tensor]`): route -> `uint8 [num_bytes]`, for the routes that this process holds.
            num_routes (`int`): K; exactly one process holds each route.
            num_bytes (`int`): bytes of one route.

        Returns:
            `uint8 [num_routes, num_bytes]`, on the CPU, the same on all processes.
        """
        merged = torch.zeros(num_routes, num_bytes, dtype=torch.uint8)
        for route, packed in own.items():
            merged[route] = packed
        return self.sum(merged)


def appears(file: Path) -> bool:
    """Waits up to `SHARED_FOLDER_PATIENCE` seconds for `file`. Returns whether it exists."""
    deadline = time.monotonic() + SHARED_FOLDER_PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


logger = logging.getLogger(__name__)

# Seconds between two heartbeats, and seconds without one after which a process counts as gone. The second is long, so
# that a machine under load, or a long library call that holds Python's lock, does not count.
INTERVAL = 1.0
PATIENCE = 30.0

_HOST_IS_GONE = "process 0 is gone, and it held the connections."
_LEFT = -(2**40)  # added to the heartbeat count of a process that has left without an error


class Heartbeat:
    """
    A context for work that all processes do in parallel, such as a run.

    Each process sends heartbeats and watches those of the next one, through the key-value store of
    `torch.distributed`. It uses no collectives, so the work inside may differ between processes. If an exception
    leaves the context on one process, or a process is killed, all others end too, a few seconds after `PATIENCE` at
    the latest. The cause is shown once: by the process that failed first, or by the first that notices that another is
    gone. The others log which process ended the run, and exit with status 1.

    With one process the context does nothing.

    Args:
        rank (`int`): rank of this process.
        world_size (`int`): number of processes. All must enter the context.
    """

    _entered = itertools.count()

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._meetings = itertools.count()
        self._stopping = threading.Event()
        self._has_said = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self.world_size > 1:
            self._store = dist.PrefixStore(f"hf_rtl/{next(self._entered)}", self._connect())
            self._store.set(f"host/{self.rank}", socket.gethostname())
            self._store.add(f"beat/{self.rank}", 1)
            self._thread = threading.Thread(target=self._watch, name="hf_rtl-heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            self.leave()
            return
        try:
            # A broken connection is the effect of another process's failure, and that failure is shown instead.
            broken = isinstance(error, dist.DistError) or "gloo" in str(error)
            gone = self._silent() if broken else []
            self._stop()
            cause = self._claim(f"{self._name(gone[0])} is gone: killed, or out of memory." if gone else "")
        except dist.DistError:
            cause = _HOST_IS_GONE
        if cause:
            self._say(cause)
            self._let_the_first_end_first()
            raise SystemExit(1) from None
        if self.rank == 0:
            # The store may live in this process, and the others still have to read the cause from it.
            atexit.register(time.sleep, 2 * INTERVAL)

    def _connect(self) -> dist.Store:
        """A separate connection to the key-value store: the main thread may block the default one for long."""
        store: Any = dist.distributed_c10d._get_default_store()  # PyTorch's type stubs lack some of its methods
        timeout = store.timeout
        store.set_timeout(timedelta(seconds=PATIENCE))
        try:
            return store.clone()
        except dist.DistError:
            self._say(_HOST_IS_GONE)
            raise SystemExit(1) from None
        finally:
            store.set_timeout(timeout)

    def meet(self) -> None:
        """Waits without a time limit until all processes are here; a collective would have a limit."""
        if self._thread is not None:
            self._wait_for(f"meeting/{next(self._meetings)}", self.world_size)

    def _wait_for(self, key: str, number: int, patience: float = math.inf) -> None:
        self._store.add(key, 1)
        pause, start = 0.001, time.monotonic()
        while self._store.add(key, 0) < number and time.monotonic() - start < patience:
            time.sleep(pause)
            pause = min(2 * pause, INTERVAL / 4)

    def leave(self) -> None:
        self.meet()
        if self.rank == 0:
            # Process 0 leaves last: the store may live in this process.
            self._wait_for("left", self.world_size, PATIENCE)
        self._stop()
        self._store.add(f"beat/{self.rank}", _LEFT)
        if self.rank > 0:
            self._store.add("left", 1)

    def _stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _let_the_first_end_first(self) -> None:
        """Waits: a launcher names the process that ends first as the cause, and kills the others."""
        time.sleep(6 * INTERVAL)

    def _watch(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        latest = num_missed = 0
        while not self._stopping.wait(INTERVAL):
            try:
                self._store.add(f"beat/{self.rank}", 1)
                beats = self._store.add(f"beat/{neighbour}", 0)
                if self._store.check(["failure"]):
                    self._end(self._claim(""), first=False)
                # Counts own ticks: a clock goes on while all are suspended. 0 beats: not entered yet; below 0: left.
                num_missed = num_missed + 1 if beats == latest > 0 else 0
                latest = beats
                if num_missed * INTERVAL > PATIENCE:
                    self._end(self._claim(f"{self._name(neighbour)} has given no sign of life for {PATIENCE:g} s."))
            except dist.DistError:
                self._end(_HOST_IS_GONE)

    def _end(self, cause: str, *, first: bool = True) -> None:
        if self._stopping.is_set():
            return
        self._say(cause)
        if not first:
            self._let_the_first_end_first()
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread may hang in a collective, where no exception reaches it.
        os._exit(1)

    def _say(self, cause: str) -> None:
        # Both threads may call it, and only the first call logs.
        if self._has_said.acquire(blocking=False):
            logger.error(f"process {self.rank} ends: {cause}")

    def _claim(self, cause: str) -> str:
        """
        Records in the store that the run has failed. Returns the text to log: `cause` if this process is the first to
        fail ("" for its own exception), else a text that names the first process.
        """
        own = f"process {self.rank}"
        first = self._store.compare_set("failure", "", own).decode()
        return cause if first == own else f"{first} has ended the run."

    def _silent(self) -> list[int]:
        """The processes that have entered, have not left, and send no heartbeats."""
        before = [self._store.add(f"beat/{rank}", 0) for rank in range(self.world_size)]
        time.sleep(3 * INTERVAL)
        after = [self._store.add(f"beat/{rank}", 0) for rank in range(self.world_size)]
        return [rank for rank, (one, two) in enumerate(zip(before, after, strict=True)) if one == two > 0]

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self._store.get(f'host/{rank}').decode()}"
