"""Processes that tests start: they find this checkout before any other `hf_rtl`, wherever they run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


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


def package_file() -> str:
    """The file of `hf_rtl` that this process has imported, or would import."""
    return importlib.util.find_spec("hf_rtl").origin
