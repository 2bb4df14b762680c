"""Processes that tests start: they find this checkout before any other `hf_rtl`, wherever they run."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[1]
# A server that has imported everything once: a process is forked from it in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def environment(**more: str) -> dict[str, str]:
    """
    The variables of this process and `more` for a child process, with the root of the checkout as the first folder in
    which Python looks for modules. Without it, a child process imports whichever `hf_rtl` is installed.
    """
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **more}


def run_program(
    program: str, *arguments: str | Path, folder: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """
    Runs a program text, as `python -c` does.

    Args:
        folder (`Path`): the working directory, in which Python looks for modules first.
        check (`bool`): whether to raise `RuntimeError`, with the output, if the program fails.
    """
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    if check and result.returncode:
        raise RuntimeError(f"exit code {result.returncode}:\n{result.stdout}{result.stderr}")
    return result


def fork(function: Callable, *arguments: Any, output: Path, errors: Path | None = None, **variables: str) -> Any:
    """
    Starts `function(*arguments)` in a process that is forked from one that has imported everything.

    Args:
        function (`Callable`): a function of a module.
        output (`Path`): the file for all that the process prints.
        errors (`Path`, *optional*): another file for what it prints to its standard error.
        variables (`str`): environment variables of the process.

    Returns:
        The `multiprocessing.Process`.
    """
    with pytest.MonkeyPatch.context() as patched:
        # The server looks for modules in its working directory and in this path.
        patched.chdir(ROOT)
        patched.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        forkserver.ensure_running()
    files = [str(output), str(errors or output)]
    process = _CONTEXT.Process(target=_run_forked, args=(function, arguments, files, variables))
    process.start()
    return process


def run_script(
    script: Path, *arguments: object, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """
    Runs a file as `python FILE ARGUMENTS` does, in a forked process: none of what it imports takes time again.

    Args:
        check (`bool`): whether to raise `RuntimeError`, with what it prints, if it fails.
        variables (`str`): environment variables.
    """
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = fork(_run_file, command, output=output, errors=errors, **variables)
        process.join(300)
        result = subprocess.CompletedProcess(command, process.exitcode, output.read_text(), errors.read_text())
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{command} still runs after 300 s:\n{result.stdout}{result.stderr}")
    if check and result.returncode:
        raise RuntimeError(f"exit code {result.returncode}:\n{result.stdout}{result.stderr}")
    return result


def _run_file(command: list[str]) -> None:
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _run_forked(function: Callable, arguments: tuple, files: list[str], variables: dict[str, str]) -> None:
    import torch  # not above: short programs import this file, and torch takes seconds

    os.environ.update(variables)
    # torch makes its pool of threads anew in a forked process, which two threads must not do at once.
    torch.set_num_threads(torch.get_num_threads())
    for file, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    function(*arguments)
    sys.stdout.flush()


def package_file() -> str:
    """The file of `hf_rtl` that this process has imported, or would import."""
    return importlib.util.find_spec("hf_rtl").origin
