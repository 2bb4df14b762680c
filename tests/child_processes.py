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
    Variables for a child process: those of this process and `more`, with the root of the checkout as the first folder
    in which Python looks for modules. Without it, a child process takes whichever `hf_rtl` is installed.
    """
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **more}


def run_program(
    program: str, *arguments: str | Path, folder: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """
    Runs a program text, as `python -c` does.

    Args:
        folder (`Path`): where it runs. Python looks for modules there even before the root of the checkout.
        check (`bool`): whether to raise `RuntimeError`, with what it prints, if it fails.
    """
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    if check and result.returncode:
        raise RuntimeError(f"exit code {result.returncode}:\n{result.stdout}{result.stderr}")
    return result


def package_file() -> str:
    """The file of `hf_rtl` that this process has imported, or would import."""
    return importlib.util.find_spec("hf_rtl").origin
