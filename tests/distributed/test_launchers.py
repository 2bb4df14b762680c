"""The recipe under launchers: the real number of processes, and two launchers in place of two machines."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child_processes import ROOT, run_script
from tests.distributed.launchers import ACCELERATE, TORCH, Command, Launcher
from tests.distributed.processes import free_port
from tests.training.small_runs import SMALL_NET


pytestmark = pytest.mark.slow

RECIPES = ROOT / "recipes"
SMALL = [
    *("--config", str(RECIPES / "configs/digits.yaml"), "--target_sparsity", "0.3", "--max_steps", "2"),
    *("--extraction_steps", "2", "--max_train_samples", "200", "--max_test_samples", "100", "--use_cpu"),
    *("--backbone", SMALL_NET, "--image_size", "16"),
]
MULTI_NODE = [*ACCELERATE, "--config_file", str(RECIPES / "accelerate/multi_node.yaml"), "--num_processes", "2"]


@pytest.fixture
def machines() -> Iterator[list[Launcher]]:
    """A list for launchers, which are stopped after the test."""
    started: list[Launcher] = []
    yield started
    for launcher in started:
        launcher.stop()


def with_torch(machine: int, port: int) -> list[str]:
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [*TORCH, "--nproc_per_node", "1", "--nnodes", "2", "--node_rank", str(machine), *address]


def with_accelerate(machine: int, port: int) -> list[str]:
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [*MULTI_NODE, "--machine_rank", str(machine), *address]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """
    `accelerate launch --cpu --num_processes 2` with a script that prints which `hf_rtl` its process has, and how many
    processes there are.
    """
    folder = tmp_path_factory.mktemp("command")
    script = folder / "script.py"
    script.write_text(
        "from accelerate import PartialState\nfrom tests.child_processes import package_file\n"
        "print(package_file())\nprint('processes', PartialState(cpu=True).num_processes)\n"
    )
    command = Command([*ACCELERATE, "--cpu", "--num_processes", "2", str(script)], folder)
    yield command
    command.stop()


@pytest.fixture(scope="module")
def printed(command: Command) -> list[str]:
    """The lines that `command` prints."""
    code, text = command.end()
    assert code == 0, text
    return text.splitlines()


def test_under_a_launcher_the_first_failure_is_shown(machines: list[Launcher], tmp_path: Path) -> None:
    """
    A launcher ends all processes as soon as one ends, but not before the failed one has shown its error. The first of
    these tests, since load delays the end of a process.
    """
    script = tmp_path / "fails.py"
    run = str(tmp_path / "run")
    script.write_text(f"from tests.distributed import runs; runs.fail({run!r}, 'vit', 'extraction', 0, {{}})\n")
    machines.append(Launcher([*TORCH, "--standalone", "--nproc_per_node", "2", str(script)], tmp_path / "log"))
    assert machines[0].wait() not in (None, 0)
    failed = machines[0].printed()
    assert failed.count("ValueError: something is wrong with sample 17") == 1
    assert re.findall(r"Root Cause.*?rank +: (\d)", failed, re.DOTALL) == ["0"]


def test_a_machine_whose_process_is_killed_ends_the_other(
    command: Command, machines: list[Launcher], tmp_path: Path
) -> None:
    """
    Through the configuration file for several machines, on CPUs by `--use_cpu` alone. `command`, which takes long to
    start, does so meanwhile.
    """
    port = free_port()
    for machine in range(2):
        line = [*with_accelerate(machine, port), str(RECIPES / "prune.py"), *SMALL, "--extraction_steps", "100"]
        line += ["--output_dir", str(tmp_path / "run")]
        machines.append(Launcher(line, tmp_path / f"log-{machine}", impatient=True))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/extraction/event-*/*.safetensors")):
        assert time.monotonic() < deadline and all(launcher.process.is_alive() for launcher in machines)
        time.sleep(0.1)
    assert re.findall(r"^processes +(\d+)$", machines[0].printed(), re.MULTILINE) == ["2"]
    number = re.search(r"process number (\d+)", machines[1].printed())
    assert number is not None
    os.kill(int(number[1]), signal.SIGKILL)
    start = time.monotonic()
    assert all(launcher.wait(60) not in (None, 0) for launcher in machines)
    assert time.monotonic() - start < 60
    assert "process 0 ends: process 1 on" in machines[0].printed()


def test_what_a_launcher_starts_has_the_hf_rtl_of_this_checkout(printed: list[str]) -> None:
    assert printed.count(str(ROOT / "hf_rtl" / "__init__.py")) == 1


def test_accelerate_starts_one_process_on_cpus_whatever_it_is_told(printed: list[str]) -> None:
    """If this fails, accelerate has changed: update README.md, docs/how-to/ and recipes/accelerate/cpu.yaml."""
    assert [line for line in printed if line.startswith("processes")] == ["processes 1"]


def _of_hf_rtl(printed: str) -> list[str]:
    """
    The lines that are not torch's own: torch logs if torchao is installed, or if one launcher ends before the other (a
    warning, an exception and its frames); nor `Launcher`'s.
    """
    of_torch = re.compile(r"process number \d+|\[?[WE]\d{4} \d\d:\d\d:\d\d\.\d+|Exception raised from|frame #\d+|$")
    return [line for line in printed.splitlines() if not of_torch.match(line)]


def test_two_machines_find_the_masks_of_one_process(machines: list[Launcher], tmp_path: Path) -> None:
    alone = run_script(RECIPES / "prune.py", *SMALL, "--output_dir", tmp_path / "alone", OMP_NUM_THREADS="1")
    assert re.search(r"^processes +1$", alone.stdout, re.MULTILINE)
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
    results = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("alone", "run")]
    assert [result["num_processes"] for result in results] == [1, 2]
    assert len({result["rounds"][0]["mask_fingerprint"] for result in results}) == 1
