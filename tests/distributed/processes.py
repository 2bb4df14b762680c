"""Starts functions in several processes that find each other as those of `torchrun` do, and kills them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hf_rtl.training.processes
from tests.child_processes import fork


class Team:
    """
    `world_size` processes that run `function(*arguments)`, connected by gloo over the loopback address.

    Args:
        function (`Callable`): a function of a module; its result is pickled.
        arguments (`tuple`): its arguments.
        world_size (`int`): number of processes.
        logs (`Path`): the folder of the processes' output, `rank-N.log`.
    """

    def __init__(self, function: Callable, arguments: tuple, *, world_size: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log_files = [logs / f"rank-{rank}.log" for rank in range(world_size)]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._connections: list[Connection] = []
        self.processes = []
        for rank, log in enumerate(self.log_files):
            variables = {"OMP_NUM_THREADS": "1"}
            if world_size > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                variables |= {"LOCAL_WORLD_SIZE": str(world_size), **address}
            ours, theirs = multiprocessing.Pipe()
            log.unlink(missing_ok=True)
            process = fork(_send_result, theirs, function, arguments, output=log, **variables)
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    def kill(self, ranks: list[int] | None = None) -> None:
        """Sends SIGKILL to `ranks`, by default to all."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.kill()

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes. Kills all and raises `TimeoutError` if one has not ended after `timeout` seconds."""
        for process in self.processes:
            process.join(timeout)
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def results(self, timeout: float = 300) -> list[Any]:
        """The result of `function` in every process. Raises `RuntimeError` with all output if one failed."""
        received = []
        for connection, process in zip(self._connections, self.processes, strict=True):
            while not connection.poll(0.05) and process.is_alive():
                pass
            try:
                received.append(connection.recv())
            except EOFError:  # The process failed; its exit code shows it below.
                break
        codes = self.wait(timeout)
        if any(codes):
            raise RuntimeError(f"exit codes {codes}:\n{self.output()}")
        return received

    def output(self) -> str:
        return "\n".join(f"--- rank {r}\n{file.read_text()}" for r, file in enumerate(self.log_files) if file.exists())


def launch(function: Callable, *arguments: Any, world_size: int, logs: Path) -> list[Any]:
    """The results of `function(*arguments)` in each of `world_size` processes."""
    return Team(function, arguments, world_size=world_size, logs=logs).results()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _send_result(connection: Connection, function: Callable, arguments: tuple) -> None:
    # There is no launcher, which would have to see which process failed first.
    hf_rtl.training.processes.Heartbeat._let_the_first_end_first = lambda heartbeat: None
    hf_rtl.training.processes.INTERVAL = 0.25
    # As with `torchrun`, an exception ends the process with its traceback and status 1.
    try:
        connection.send(function(*arguments))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(1)
