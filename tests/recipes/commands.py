"""The commands of recipes/ in child processes."""

from __future__ import annotations

import subprocess
import sys

from tests.child_processes import ROOT, environment


RECIPES = ROOT / "recipes"


def run(script: str, *arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command of recipes/ to its end. `check`: whether it must succeed."""
    return run_python(str(RECIPES / script), *arguments, check=check, **variables)


def run_python(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with any arguments, as `run` does."""
    command = [sys.executable, *map(str, arguments)]
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**variables), timeout=300)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result
