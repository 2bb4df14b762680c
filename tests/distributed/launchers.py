"""Launchers: as commands, or forked, so that neither they nor their workers import anything again."""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import torch.distributed.run
import transformers
from accelerate.commands import launch as accelerate_launch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import hf_rtl.training.processes
from tests.child_processes import environment, fork


TORCH = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# What other tests set, and a shell does not.
OURS = ("ACCELERATE_", "TRANSFORMERS_")


class Command:
    """
    A launcher as a command.

    Args:
        command (`list[str]`): what to run.
        folder (`Path`): the working directory, in which the file `log` gets all that is printed.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self._log = folder / "log"
        variables = environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        variables = {name: value for name, value in variables.items() if not name.startswith(OURS)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it and its workers have printed."""
        return self.process.wait(180), self._log.read_text()

    def stop(self) -> None:
        """Ends it and its workers, unless it has ended."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Launcher:
    """
    A launcher that does in a forked process what its command does, except that it forks its workers.

    Args:
        command (`list[str]`): a command that begins as `TORCH` or `ACCELERATE`.
        log (`Path`): file for the output of the launcher and its workers.
        impatient (`bool`): whether workers notice one that has been killed sooner, and print their process number.
    """

    def __init__(self, command: list[str], log: Path, *, impatient: bool = False) -> None:
        self._log = log
        self.process: Process = fork(_launch, command, impatient, output=log, OMP_NUM_THREADS="1")

    def printed(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 120) -> int | None:
        """Its exit code; `None` if it still runs."""
        self.process.join(timeout)
        return self.process.exitcode

    def stop(self) -> None:
        """Ends it and its workers, unless it has ended."""
        self.process.terminate()
        self.process.join(60)
        self.process.kill()


def _launch(command: list[str], impatient: bool) -> None:
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    transformers.logging.set_verbosity_warning()
    if impatient:
        hf_rtl.training.processes.INTERVAL = 0.5
        hf_rtl.training.processes.PATIENCE = 4.0
    torch.distributed.run.elastic_launch = _fork_workers
    main = {TORCH[-1]: torch.distributed.run.main, ACCELERATE[-1]: accelerate_launch.main}[command[2]]
    sys.argv = command[2:]
    main()


def _fork_workers(config: LaunchConfig, entrypoint: str) -> Callable:
    assert entrypoint == sys.executable
    config.start_method = "fork"
    return elastic_launch(config, _work)


def _work(unbuffered: str, script: str, *arguments: str) -> None:
    assert unbuffered == "-u"
    print("process number", os.getpid(), flush=True)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        # As in an interpreter. Torch would catch it, and show it with the cause.
        traceback.print_exc()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(1)
