"""The commands of recipes/ in child processes."""

from __future__ import annotations

import subprocess

from tests.child_processes import ROOT, run_script


RECIPES = ROOT / "recipes"


def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command of recipes/ to its end. `check`: whether it must succeed."""
    return run_script(RECIPES / script, *arguments, check=check, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
