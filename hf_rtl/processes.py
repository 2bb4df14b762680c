"""What the processes of a run tell each other outside of training steps: whether they agree, what each has found."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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

    def of_first(self, value: Any) -> Any:
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
            token = folder / self.of_first(f".shared.{owner}{secrets.token_hex(8)}.tmp")
            if self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                token.touch()
            self.wait()
            name = f"{self.rank} on {socket.gethostname()}"
            blind = [told for told in self.gather(None if _appears(token) else name) if told]
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


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SHARED_FOLDER_PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
