"""Checkpoints: only unchanged sealed ones are used."""

import errno
import json

import pytest

import hf_rtl.modeling.hashing
from hf_rtl.training.run_directory import (
    CHECKPOINT_FILE,
    best_checkpoint,
    is_whole,
    last_usable_checkpoint,
    mark_complete,
)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-20"
    (folder / "inner").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(range(256)) * 5000)  # more than is read at once
    (folder / "inner" / "state.json").write_text("{}")
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
    mark_complete(folder, world_size=2)
    return folder


def test_a_seal_lists_every_file(checkpoint):
    assert set(json.loads((checkpoint / CHECKPOINT_FILE).read_text())["files"]) == {
        "optimizer.pt",
        "inner/state.json",
        "trainer_state.json",
    }
    assert is_whole(checkpoint)


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "inner missing", "no seal", "half a seal", "empty"])
def test_a_damaged_checkpoint_is_not_whole(checkpoint, damage):
    file = checkpoint / "optimizer.pt"
    if damage == "altered":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "inner missing":
        (checkpoint / "inner" / "state.json").unlink()
    elif damage == "no seal":
        (checkpoint / CHECKPOINT_FILE).unlink()
    elif damage == "half a seal":
        (checkpoint / CHECKPOINT_FILE).write_text((checkpoint / CHECKPOINT_FILE).read_text()[:-10])
    else:
        file.write_bytes(b"")
    assert not is_whole(checkpoint)


def test_the_last_whole_checkpoint_is_found_by_number_and_later_ones_are_removed(checkpoint, caplog):
    folder = checkpoint.parent
    for number, sealed in ((3, True), (100, False), (9, True)):
        other = folder / f"checkpoint-{number}"
        other.mkdir()
        (other / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
        if sealed:
            mark_complete(other, world_size=2)
    for name in ("checkpoint-best", "checkpoint-100.bak", "checkpoint-7-mine"):  # not Trainer's
        (folder / name).mkdir()
    assert last_usable_checkpoint(folder, world_size=2) == checkpoint
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-100.bak",
        "checkpoint-20",
        "checkpoint-3",
        "checkpoint-7-mine",
        "checkpoint-9",
        "checkpoint-best",
    ]
    assert [record.message.count("checkpoint-100'") for record in caplog.records] == [1]
    (checkpoint / CHECKPOINT_FILE).unlink()
    assert last_usable_checkpoint(folder, world_size=2) == folder / "checkpoint-9"


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert last_usable_checkpoint(tmp_path, world_size=1) is None
    assert last_usable_checkpoint(tmp_path / "missing", world_size=1) is None


def test_another_number_of_processes_is_warned_of(checkpoint, caplog):
    assert last_usable_checkpoint(checkpoint.parent, world_size=2) == checkpoint
    assert not caplog.records
    assert last_usable_checkpoint(checkpoint.parent, world_size=3) == checkpoint
    assert ["made by 2 process(es) and is continued by 3" in record.message for record in caplog.records] == [True]


def test_a_checkpoint_whose_best_checkpoint_is_damaged_is_not_used(checkpoint):
    """At its end, training loads the best checkpoint."""
    best = checkpoint.parent / "checkpoint-10"
    best.mkdir()
    (best / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(best)}))
    (best / "model.safetensors").write_bytes(b"best")
    mark_complete(best, world_size=1)
    # A path from before the folder of the run was moved.
    (checkpoint / "trainer_state.json").write_text('{"best_model_checkpoint": "runs/elsewhere/checkpoint-10"}')
    mark_complete(checkpoint, world_size=1)
    assert best_checkpoint(checkpoint) == best
    assert last_usable_checkpoint(checkpoint.parent, world_size=1) == checkpoint
    (best / "model.safetensors").write_bytes(b"bent")
    assert last_usable_checkpoint(checkpoint.parent, world_size=1) is None


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(checkpoint, monkeypatch):
    def stale(*arguments, **keywords):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(hf_rtl.modeling.hashing, "hash_file", stale)
    with pytest.raises(OSError, match="Stale"):
        last_usable_checkpoint(checkpoint.parent, world_size=2)
    assert checkpoint.exists()
