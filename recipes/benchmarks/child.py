"""Tasks in processes of their own, so that their memory and their imports are their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


STATUS = Path("/proc/self/status")
RECIPES = Path(__file__).parents[1]


def in_child(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """What a function of a module of the benchmarks gives in a new process. `arguments` and the result are JSON."""
    command = [sys.executable, "-m", "benchmarks.child", function.__module__, function.__name__, json.dumps(arguments)]
    paths = [str(RECIPES), str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def memory() -> int:
    """Bytes of memory that this process has now."""
    return _status("VmRSS") if STATUS.exists() else peak_memory()


def peak_memory() -> int:
    """The most bytes of memory that this process has had, since the last `forget_peak`."""
    # Linux starts `ru_maxrss` of a child with the memory of its parent.
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Lets the peak of this process begin anew, where the system can do that."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _status(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    from importlib import import_module

    result = getattr(import_module(sys.argv[1]), sys.argv[2])(**json.loads(sys.argv[3]))
    print(json.dumps(result))
