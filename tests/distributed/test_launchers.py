"""The recipe under launchers: the real number of processes, and two launchers in place of two machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child_processes import ROOT, environment
from tests.distributed.processes import free_port


pytestmark = pytest.mark.slow

RECIPES = ROOT / "recipes"
SMALL = [
    *("--config", str(RECIPES / "configs/digits.yaml"), "--target_sparsity", "0.3", "--max_steps", "10"),
    *("--extraction_steps", "2", "--use_cpu"),
]
TORCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
MULTI_NODE = [*ACCELERATE, "--config_file", str(RECIPES / "accelerate/multi_node.yaml"), "--num_processes", "2"]

# A program that runs the recipe with less patience, and prints the id of its process.
IMPATIENT = f"""
import os, runpy, sys
import hf_rtl.training.processes

hf_rtl.training.processes.PATIENCE = 10.0
hf_rtl.training.processes.SHARED_FOLDER_PATIENCE = 2.0
print("process number", os.getpid(), flush=True)
sys.path.insert(0, {str(RECIPES)!r})
runpy.run_path({str(RECIPES / "prune.py")!r}, run_name="__main__")
"""


class Launcher:
    """
    A launcher in a process of its own.

    Args:
        command (`list[str]`): what to run.
        log (`Path`): file for the output of the launcher and its workers.
        folder (`Path`, *optional*): the working directory.
    """

    def __init__(self, command: list[str], log: Path, folder: Path | None = None) -> None:
        self._log = log
        # The environment of a shell, without the other variables that tests set.
        ours = ("ACCELERATE_", "TRANSFORMERS_")
        variables = environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        variables = {name: value for name, value in variables.items() if not name.startswith(ours)}
        with log.open("w") as opened:
            self.process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=opened, stderr=subprocess.STDOUT
            )

    def printed(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 120) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> None:
        """Ends it and its workers, unless it has ended."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Launcher]]:
    """A list for launchers, which are stopped after the test."""
    started: list[Launcher] = []
    yield started
    for launcher in started:
        launcher.stop()


def with_torch(machine: int, port: int) -> list[str]:
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [*TORCH, "--nnodes", "2", "--node_rank", str(machine), *address]


def with_accelerate(machine: int, port: int) -> list[str]:
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [*MULTI_NODE, "--machine_rank", str(machine), *address]


@pytest.fixture
def impatient(tmp_path: Path) -> str:
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    return str(script)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """The output of `accelerate launch --cpu --num_processes 2`, and the results of its run."""
    folder = tmp_path_factory.mktemp("alone")
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", str(RECIPES / "prune.py"), *SMALL]
    launcher = Launcher([*command, "--output_dir", str(folder / "run")], folder / "log")
    try:
        assert launcher.wait() == 0, launcher.printed()
    finally:
        launcher.stop()
    return launcher.printed(), json.loads((folder / "run/results.json").read_text())


def test_what_a_launcher_starts_has_the_hf_rtl_of_this_checkout(machines: list[Launcher], tmp_path: Path) -> None:
    script = tmp_path / "says_where.py"
    script.write_text("from tests.child_processes import package_file; print(package_file())\n")
    command = [*TORCH, "--standalone", str(script)]
    machines.append(Launcher(command, tmp_path / "log", tmp_path))
    assert machines[0].wait() == 0, machines[0].printed()
    assert str(ROOT / "hf_rtl" / "__init__.py") in machines[0].printed().splitlines()


def test_accelerate_starts_one_process_on_cpus_whatever_it_is_told(alone: tuple[str, dict]) -> None:
    """If this fails, accelerate has changed: update README.md, docs/how-to.md and recipes/accelerate/cpu.yaml."""
    printed, results = alone
    assert re.search(r"^processes +1$", printed, re.MULTILINE)
    assert results["num_processes"] == 1


def _of_hf_rtl(printed: str) -> list[str]:
    """
    The lines that are not torch's own: torch logs if torchao is installed, or if one launcher ends before the other (a
    warning, an exception and its frames).
    """
    of_torch = re.compile(r"\[?[WE]\d{4} \d\d:\d\d:\d\d\.\d+|Exception raised from|frame #\d+|$")
    return [line for line in printed.splitlines() if not of_torch.match(line)]


def test_two_machines_find_the_masks_of_one_process(
    alone: tuple[str, dict], machines: list[Launcher], tmp_path: Path
) -> None:
    port = free_port()
    for machine in range(2):
        command = [*with_torch(machine, port), str(RECIPES / "prune.py"), *SMALL]
        command += ["--output_dir", str(tmp_path / "run")]
        machines.append(Launcher(command, tmp_path / f"log-{machine}"))
    codes = [launcher.wait() for launcher in machines]
    assert codes == [0, 0], [launcher.printed() for launcher in machines]
    plan, silence = (launcher.printed() for launcher in machines)
    assert re.findall(r"^processes +(\d+)$", plan, re.MULTILINE) == ["2"]
    assert plan.count("bal. acc.") == 1 and not _of_hf_rtl(silence)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["num_processes"] == 2
    assert results["rounds"][0]["mask_fingerprint"] == alone[1]["rounds"][0]["mask_fingerprint"]


def test_a_machine_whose_process_is_killed_ends_the_other(
    machines: list[Launcher], impatient: str, tmp_path: Path
) -> None:
    """Through the configuration file for several machines, on CPUs by `--use_cpu` alone."""
    port = free_port()
    for machine in range(2):
        command = [*with_accelerate(machine, port), impatient, *SMALL, "--extraction_steps", "500"]
        command += ["--output_dir", str(tmp_path / "run")]
        machines.append(Launcher(command, tmp_path / f"log-{machine}"))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/extraction/event-*/*.safetensors")):
        assert time.monotonic() < deadline and all(launcher.process.poll() is None for launcher in machines)
        time.sleep(0.1)
    assert re.findall(r"^processes +(\d+)$", machines[0].printed(), re.MULTILINE) == ["2"]
    number = re.search(r"process number (\d+)", machines[1].printed())
    assert number is not None
    os.kill(int(number[1]), signal.SIGKILL)
    start = time.monotonic()
    assert all(launcher.wait(60) != 0 for launcher in machines)
    assert time.monotonic() - start < 60
    assert "process 0 ends: process 1 on" in machines[0].printed()


def test_machines_that_share_no_folder_are_refused(machines: list[Launcher], impatient: str, tmp_path: Path) -> None:
    port = free_port()
    for machine in range(2):
        folder = tmp_path / f"machine-{machine}"
        folder.mkdir()
        command = [*with_torch(machine, port), impatient, *SMALL, "--output_dir", "run"]
        machines.append(Launcher(command, tmp_path / f"log-{machine}", folder))
    assert all(launcher.wait() != 0 for launcher in machines)
    printed = "".join(launcher.printed() for launcher in machines)
    assert printed.count("must be on a disk that all of them share, under the same path.") == 1
    assert "process 1 on" in printed and not (tmp_path / "machine-0/run/run.json").exists()


def test_under_a_launcher_the_first_failure_is_shown(tmp_path: Path, machines: list[Launcher]) -> None:
    """A launcher ends all processes as soon as one ends, but not before the failed one has shown its error."""
    script = tmp_path / "fails.py"
    script.write_text(
        f"from tests.distributed import runs; runs.fail({str(tmp_path / 'run')!r}, 'extraction', 0, {{}})\n"
    )
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    machines.append(Launcher(two, tmp_path / "log"))
    assert machines[0].wait() != 0
    printed = machines[0].printed()
    assert printed.count("ValueError: something is wrong with sample 17") == 1
    assert re.findall(r"Root Cause.*?rank +: (\d)", printed, re.DOTALL) == ["0"]
