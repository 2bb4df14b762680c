"""What the processes of a run tell each other outside of training steps: whether they agree, what each has found."""

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


# Seconds after which a file that another machine wrote must be seen: network file systems cache what a folder holds.
SHARED_FOLDER_PATIENCE = 60.0


class Processes:
    """All processes of a run, as one of them sees them. Every method but the properties must be called by all."""

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
        """Everyone's value, by rank."""
        return gather_object([value])

    def from_rank_zero(self, value: Any) -> Any:
        """Process 0's value."""
        return broadcast_object_list([value])[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the CPU."""
        return self._accelerator.reduce(values.to(self._accelerator.device), "sum").cpu()

    def check_same(self, values: Mapping[str, Any]) -> None:
        """
        Raises:
            RuntimeError: a process has other `values` than process 0; names the first one and what differs.
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
        Whether process 0 can write into `folders` and all others see what it wrote. Creates missing ones. `owner` is
        part of the name of what it writes.

        Raises:
            OSError: process 0 cannot write.
            RuntimeError: another machine has another folder of that name.
        """
        for folder in folders:
            token = folder / self.from_rank_zero(f".shared.{owner}{secrets.token_hex(8)}.tmp")
            if self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                token.touch()
            self.wait()
            name = f"{self.rank} on {socket.gethostname()}"
            blind = [told for told in self.gather(None if appears(token) else name) if told]
            if self.rank == 0:
                token.unlink()
            if blind:
                raise RuntimeError(
                    f"process {', '.join(blind)} does not see what process 0 wrote into "
                    f"{str(folder)!r}. With several machines, `output_dir` and `extraction_dir` must be on a disk "
                    "that all of them share, under the same path."
                )

    def merge_routes(self, own: Mapping[int, Tensor], num_routes: int, num_bytes: int) -> Tensor:
        """
        The packed masks of all routes, from what each process holds of them.

        Args:
            own (`Mapping[int, Tensor]`): `uint8 [num_bytes]` of the routes that this process holds.
            num_routes (`int`): K; each route is held by exactly one process.
            num_bytes (`int`): of one route.

        Returns:
            `uint8 [num_routes, num_bytes]`, on the CPU, the same on all processes.
        """
        merged = torch.zeros(num_routes, num_bytes, dtype=torch.uint8)
        for route, packed in own.items():
            merged[route] = packed
        return self.sum(merged)


def appears(file: Path) -> bool:
    deadline = time.monotonic() + SHARED_FOLDER_PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


logger = logging.getLogger(__name__)

# Seconds between two heartbeats, and without one after which a process counts as gone. A machine under load, or a long
# call into a library that holds Python's lock, must not look like death.
INTERVAL = 1.0
PATIENCE = 30.0

_HOST_IS_GONE = "process 0 is gone, which holds the connections."
_LEFT = -(2**40)  # what is added to the heartbeats of a process that has left in good order


class Heartbeat:
    """
    A context for work that all processes do side by side, such as a run.

    Each process sends heartbeats and listens for those of the next one, through the key-value store that
    `torch.distributed` was started with: no collectives, so that the work inside may differ between processes. If an
    exception leaves the context on one process, or one is killed, all others end too, within `PATIENCE` seconds and a
    few. The cause is shown once: by the process that failed first, or by the first to notice that another is gone. The
    others log a line that says whose message to read, and exit with status 1.

    With one process it does nothing.

    Args:
        rank (`int`): this process.
        world_size (`int`): number of processes. All must enter.
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
            # What a broken connection raises is the effect of another's failure, which is to be shown instead.
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
            # The store may live in this process: once its message is out, the others are to read why they end.
            atexit.register(time.sleep, 2 * INTERVAL)

    def _connect(self) -> dist.Store:
        """A connection of its own to the key-value store: the main thread may wait on the other one for long."""
        store: Any = dist.distributed_c10d._get_default_store()  # PyTorch's stubs lack some of its methods
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
        """Waits until all processes have come here, for as long as it takes: no collective, whose time is limited."""
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
            # Last, since the store may live in this process.
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
        """A launcher names the process that ends first as the cause, and ends those that are left."""
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
                # By own ticks, not by a clock, which goes on while all are suspended. 0: not yet here; less: has left.
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
        # The main thread may hang in a collective for ever: no exception reaches it there.
        os._exit(1)

    def _say(self, cause: str) -> None:
        # Both threads may come to it.
        if self._has_said.acquire(blocking=False):
            logger.error(f"process {self.rank} ends: {cause}")

    def _claim(self, cause: str) -> str:
        """
        Says that the run has failed. Gives what is to be shown: `cause` if this process is the first to say so ("" for
        its own exception), else who was.
        """
        own = f"process {self.rank}"
        first = self._store.compare_set("failure", "", own).decode()
        return cause if first == own else f"{first} has ended the run."

    def _silent(self) -> list[int]:
        """Processes whose hearts have stopped."""
        before = [self._store.add(f"beat/{rank}", 0) for rank in range(self.world_size)]
        time.sleep(3 * INTERVAL)
        after = [self._store.add(f"beat/{rank}", 0) for rank in range(self.world_size)]
        return [rank for rank, (one, two) in enumerate(zip(before, after, strict=True)) if one == two > 0]

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self._store.get(f'host/{rank}').decode()}"
