"""After a failure of a process or of the machine, all processes end soon, and nothing finished is lost."""

import functools
import time

import pytest

from tests.distributed import runs
from tests.distributed.processes import Team, launch


# One round, with a checkpoint after every second step.
OPTIONS = {"target_sparsity": [0.3], "save_strategy": "steps", "save_steps": 2}
# Where a process fails, and which of two; `make test-long` tries the other pairs.
PLACES = [
    ("extraction", 0),
    ("retraining", 1),
    pytest.param("extraction", 1, marks=pytest.mark.long),
    pytest.param("retraining", 0, marks=pytest.mark.long),
]


def started(folder, team, pattern, number=1):
    """Waits until a run has written `number` files that match `pattern`."""
    while len(list(folder.glob(pattern))) < number:
        assert all(process.is_alive() for process in team.processes), team.output()
        time.sleep(0.01)


def continues(folder, kind, world_size, whole):
    """Whether the run in `folder`, continued, ends as the uninterrupted one of the result `whole`."""
    logs = folder.with_name("logs-again")
    again = launch(runs.train, str(folder), kind, OPTIONS, world_size=world_size, logs=logs)
    assert [result["world_size"] for result in again] == [world_size] * world_size
    return all((again[0]["state"][name] == value).all() for name, value in whole["state"].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(kind of network, world size) -> the result of process 0 of a run with `OPTIONS`."""

    @functools.cache
    def made(kind, world_size):
        folder = tmp_path_factory.mktemp(f"whole-{world_size}")
        arguments = (str(folder / "run"), kind, OPTIONS)
        return launch(runs.train, *arguments, world_size=world_size, logs=folder / "logs")[0]

    return made


@pytest.mark.parametrize(("place", "rank"), PLACES)
def test_a_process_that_raises_ends_all_and_is_the_only_one_to_say_why(say, tmp_path, place, rank):
    begin = time.monotonic()
    team = Team(runs.fail, (str(tmp_path / "run"), "timm", place, rank, {}), world_size=2, logs=tmp_path / "logs")
    assert team.wait(60) == [1, 1]
    say(f"{place}, process {rank} of 2: all have ended after {time.monotonic() - begin:.1f} s")
    assert team.output().count("ValueError: something is wrong with sample 17") == 1
    assert team.output().count("Traceback") == 1
    assert f"process {1 - rank} ends: process {rank} has ended the run." in team.log_files[1 - rank].read_text()


@pytest.mark.slow
def test_what_was_finished_before_a_failure_is_not_lost(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    team = Team(runs.fail, (str(folder), "timm", "retraining", 1, OPTIONS), world_size=2, logs=tmp_path / "logs")
    assert team.wait(60) == [1, 1]
    masks = {path: path.read_bytes() for path in folder.glob("extraction/event-*/*")}
    assert len(masks) == 3
    assert continues(folder, "timm", 2, uninterrupted("timm", 2))
    assert all(path.read_bytes() == content for path, content in masks.items())


@pytest.mark.parametrize(("place", "rank"), PLACES)
def test_a_process_that_is_killed_ends_all(say, tmp_path, place, rank):
    """In extraction, where the others do not wait for it; in joint retraining, where a connection breaks."""
    folder = tmp_path / "run"
    team = Team(runs.train_for_long, (str(folder), place), world_size=2, logs=tmp_path / "logs")
    started(folder, team, {"extraction": "extraction/event-000/*", "retraining": "round-*/checkpoint-*"}[place])
    begin = time.monotonic()
    team.kill([rank])
    codes = team.wait(60)
    say(f"{place}, process {rank} of 2 killed: the other has ended after {time.monotonic() - begin:.1f} s")
    assert codes[rank] == -9 and codes[1 - rank] == 1
    said = team.log_files[1 - rank].read_text()
    assert said.count("ends: ") == 1 and f"process {rank}" in said
    assert "Traceback" not in said


def test_a_process_may_be_busy_for_long(tmp_path):
    """The others wait for it: the extraction of one route may take hours more than that of another."""
    options = {"target_sparsity": [0.3], "max_steps": 1, "ddp_timeout": 2}
    results = launch(runs.dawdle, str(tmp_path / "run"), 3.5, options, world_size=2, logs=tmp_path / "logs")
    assert [result["world_size"] for result in results] == [2, 2]


@pytest.mark.parametrize("place", ["extraction", "checkpoint", "model"])
@pytest.mark.slow
def test_a_full_disk_is_said_in_words_and_nothing_finished_is_lost(tmp_path, uninterrupted, place):
    """The limit is a real one, of the operating system: files may not grow beyond a size."""
    folder = tmp_path / "run"
    team = Team(runs.fill_the_disk, (str(folder), place, OPTIONS), world_size=1, logs=tmp_path / "logs")
    assert team.wait(60) == [1]
    error = team.output().strip().splitlines()[-1]
    assert error.startswith("OSError") and str(folder) in error and "MiB free" in error
    assert "What is finished is kept" in error and "give the same command again" in error
    assert not list(folder.rglob(".*.tmp"))
    masks = {path: path.read_bytes() for path in folder.glob("extraction/event-*/*")}
    assert len(masks) == {"extraction": 0, "checkpoint": 3, "model": 3}[place]
    assert continues(folder, "resnet", 1, uninterrupted("resnet", 1))
    assert all(path.read_bytes() == content for path, content in masks.items())


def test_memory_that_runs_out_is_said_in_words(tmp_path):
    team = Team(runs.exhaust_memory, (str(tmp_path / "run"),), world_size=1, logs=tmp_path / "logs")
    assert team.wait(60) == [1]
    error = team.output().strip().splitlines()[-1]
    assert error.startswith("MemoryError: out of memory with `route_batch_size` = 12 (")
    assert "can't allocate memory" in error
    assert "`gradient_accumulation_steps`" in error and "What is finished is kept" in error


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_cannot_be_written_is_said_in_words(tmp_path, world_size):
    arguments = (str(tmp_path / "run"),)
    team = Team(runs.write_into_a_read_only_folder, arguments, world_size=world_size, logs=tmp_path / "logs")
    assert set(team.wait(60)) == {1}
    assert team.output().count("OSError: [Errno 30] Read-only file system (") == 1
    assert "free some space, or make the folder writable, and give the same command again" in team.output()
    assert str(tmp_path / "run") in team.output()


def test_machines_that_share_no_folder_are_refused(tmp_path):
    folders = [tmp_path / f"machine-{machine}" for machine in range(2)]
    for folder in folders:
        folder.mkdir()
    team = Team(runs.train_apart, ([str(folder) for folder in folders],), world_size=2, logs=tmp_path / "logs")
    assert team.wait(60) == [1, 1]
    assert team.output().count("must be on a disk that all of them share, under the same path.") == 1
    assert "process 1 on" in team.output() and not (folders[0] / "run/run.json").exists()


def test_weights_that_are_to_be_split_are_refused(tmp_path):
    """On CPUs, accelerate would silently not split them."""
    arguments = (str(tmp_path / "run"), "timm", {"fsdp": "full_shard"})
    team = Team(runs.train, arguments, world_size=2, logs=tmp_path / "logs")
    assert team.wait(60) == [1, 1]
    assert "FSDP is not supported: it splits weights over devices" in team.output()
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_before_the_run_does_not_leave_others_waiting(tmp_path):
    team = Team(runs.fail_to_begin, (str(tmp_path / "run"),), world_size=2, logs=tmp_path / "logs")
    assert team.wait(60) == [1, 1]
    assert "process 1 ends: process 0 is gone" in team.output()
