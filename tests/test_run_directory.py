"""Files of a run: whole or not there, and only continued by the run that they belong to."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_rtl.modeling.files
from hf_rtl.modeling.files import read_tensors, write_json, write_tensors
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl.training.run_directory import RunDirectory


TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([-0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bits": torch.arange(256).to(torch.uint8),
    "nothing": torch.zeros(0, 5),
    "mask": torch.tensor([True, False]),
}
MASKS = [torch.arange(15).view(3, 5) % 2 == 0, torch.arange(8).view(8, 1) < 3]
SHAPES = [mask.shape for mask in MASKS]


def same_bits(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and hash_tensors({"x": one}) == hash_tensors({"x": other})
    )


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_tensors_come_back_to_the_bit(tmp_path):
    file = tmp_path / "a" / "b" / "tensors.safetensors"
    strided = {**TENSORS, "strided": torch.arange(12.0).view(3, 4).t(), "expanded": torch.ones(1).expand(4)}
    write_tensors(file, strided, note="hello")
    read = read_tensors(file)
    assert read.keys() == strided.keys()
    assert all(same_bits(read[name], tensor.contiguous()) for name, tensor in strided.items())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_missing_file_is_none(tmp_path):
    assert read_tensors(tmp_path / "none.safetensors") is None
    assert read_tensors(tmp_path / "no folder" / "none.safetensors") is None


def test_a_file_cut_short_at_any_place_is_none(tmp_path):
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, TENSORS)
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert read_tensors(file) is None, length
    file.write_bytes(whole)
    assert read_tensors(file) is not None


def test_an_altered_file_is_none(tmp_path):
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, TENSORS)
    whole = bytearray(file.read_bytes())
    for position in (len(whole) - 1, len(whole) - 100):
        altered = whole.copy()
        altered[position] ^= 1
        file.write_bytes(altered)
        assert read_tensors(file) is None
    tensors = load_file(file)
    save_file(tensors, file)  # without a hash
    assert read_tensors(file) is None
    save_file(
        {**tensors, "more": torch.ones(1)}, file, metadata={"hf_rtl": json.dumps({"sha256": hash_tensors(tensors)})}
    )
    assert read_tensors(file) is None


def test_the_hash_covers_names_types_shapes_and_bits():
    tensor = torch.tensor([[0.0, 1.0]])
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 1)},
        {"a": tensor.view(torch.int32)},
        {"a": -tensor},
        {"a": tensor, "b": tensor},
        {},
    ]
    assert len({hash_tensors(tensors) for tensors in variants}) == len(variants)
    two = {"a": tensor, "b": torch.ones(2)}
    assert hash_tensors(two) == hash_tensors(dict(reversed(two.items())))
    assert hash_tensors({"a": torch.arange(6.0).view(2, 3).t()}) == hash_tensors(
        {"a": torch.arange(6.0).view(2, 3).t().contiguous()}
    )


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, kind):
    file = tmp_path / "file"
    write = {"json": lambda value: write_json(file, value), "tensors": lambda value: write_tensors(file, value)}[kind]
    old, new = {"json": ({"a": 1}, {"a": 2}), "tensors": (TENSORS, {"a": torch.ones(9)})}[kind]
    write(old)
    before = file.read_bytes()

    class KilledError(BaseException):
        pass

    def killed(*_):
        raise KilledError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KilledError):
        write(new)
    assert file.read_bytes() == before
    monkeypatch.undo()
    write(new)
    assert file.read_bytes() != before


def test_tensors_are_written_beside_and_renamed(tmp_path, monkeypatch):
    """At no time is there a part of a file under its name."""
    seen = []

    def watched(tensors, path, **kwargs):
        seen.append(os.fspath(path))
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(hf_rtl.modeling.files, "save_file", watched)
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert len(seen) == 1
    assert os.path.basename(seen[0]) != "x.safetensors"
    assert os.path.dirname(seen[0]) == str(tmp_path)  # of one file system, where renaming is atomic


def test_masks_come_back_and_damaged_ones_do_not(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.load_masks(2, 1, SHAPES) is None
    directory.save_masks(2, 1, MASKS, started_from="abc")
    loaded = directory.load_masks(2, 1, SHAPES)
    assert all(torch.equal(*pair) and pair[0].dtype == torch.bool for pair in zip(loaded, MASKS, strict=True))
    assert directory.load_masks(1, 2, SHAPES) is None
    file = directory.mask_file(2, 1)
    assert file.parent.parent == tmp_path / "extraction"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert directory.load_masks(2, 1, SHAPES) is None


def test_every_route_and_event_has_a_file_of_its_own(tmp_path):
    directory = RunDirectory(tmp_path)
    names = {directory.mask_file(event, route) for event in range(120) for route in range(120)}
    assert len(names) == 120 * 120


CONFIGURATION = {"seed": 1, "sparsity": [0.5], "model": {"norm_statistics": "shared"}}
EXTRACTION = {"seed": 1}
VERSIONS = {"torch": "2"}


def test_a_run_is_continued_with_the_same_configuration(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    before = files(tmp_path)
    assert {path.name for path in before} == {"run.json", "extraction.json"}
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written == {"configuration": CONFIGURATION, "surroundings": VERSIONS}
    # Tuples become lists in JSON; other versions do not stop a run.
    RunDirectory(tmp_path / "run").open({**CONFIGURATION, "sparsity": (0.5,)}, EXTRACTION, {"torch": "3"})
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "named", "left_out"),
    [
        ({"seed": 2}, ["seed: 1 there, 2 now"], ["sparsity"]),
        ({"sparsity": [0.5, 0.75]}, ["sparsity: [0.5] there, [0.5, 0.75] now"], ["seed:"]),
        ({"new": "x"}, ['new: null there, "x" now'], ["seed:"]),
        ({"seed": 2, "model": {"norm_statistics": "per_route"}}, ["seed: 1 there, 2 now", "model: {"], ["sparsity"]),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(tmp_path, changed, named, left_out):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    before = files(tmp_path)
    with pytest.raises(ValueError) as raised:
        RunDirectory(tmp_path).open({**CONFIGURATION, **changed}, EXTRACTION, VERSIONS)
    for text in [*named, str(tmp_path), "another `output_dir`"]:
        assert text in str(raised.value)
    for text in left_out:
        assert text not in str(raised.value)
    assert files(tmp_path) == before


def test_a_value_that_is_gone_is_named(tmp_path):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    with pytest.raises(ValueError, match="seed: 1 there, null now"):
        RunDirectory(tmp_path).open({k: v for k, v in CONFIGURATION.items() if k != "seed"}, EXTRACTION, VERSIONS)


def test_long_values_are_shortened(tmp_path):
    RunDirectory(tmp_path).open({"prunable": ["weight"] * 1000}, {}, VERSIONS)
    with pytest.raises(ValueError) as raised:
        RunDirectory(tmp_path).open({"prunable": ["other"] * 1000}, {}, VERSIONS)
    assert len(str(raised.value)) < 600


def test_extracted_masks_are_shared_by_runs_that_agree_on_them(tmp_path):
    shared = tmp_path / "masks"
    first = RunDirectory(tmp_path / "first", shared)
    first.open(CONFIGURATION, EXTRACTION, VERSIONS)
    first.save_masks(0, 0, MASKS)
    second = RunDirectory(tmp_path / "second", shared)
    second.open({**CONFIGURATION, "model": {"norm_statistics": "per_route"}}, EXTRACTION, VERSIONS)
    assert second.load_masks(0, 0, SHAPES) is not None
    before = files(tmp_path)
    third = RunDirectory(tmp_path / "third", shared)
    with pytest.raises(ValueError, match="seed: 1 there, 2 now.*`extraction_dir`"):
        third.open({**CONFIGURATION, "seed": 2}, {"seed": 2}, VERSIONS)
    assert files(tmp_path) == before  # not even a run.json of the third


REPORT_OF_A_ROUND = {"round": 1, "kept": {"ant": 3}}


def finished_round(tmp_path):
    folder = tmp_path / "round-01-sparsity-0.5"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("not ours")
    return folder, RunDirectory(tmp_path).write_report(folder, REPORT_OF_A_ROUND)


def test_a_finished_round_comes_back(tmp_path):
    folder, written = finished_round(tmp_path)
    assert written == {**REPORT_OF_A_ROUND, "files": written["files"]}
    assert set(written["files"]) == {"model.safetensors", "config.json"}
    (folder / "notes.txt").unlink()
    (folder / "more.json").write_text("{}")
    assert RunDirectory(tmp_path).read_report(folder) == written


@pytest.mark.parametrize("damage", ["altered", "missing", "half a report", "other report"])
def test_a_damaged_round_is_not_finished(tmp_path, caplog, damage):
    folder, _ = finished_round(tmp_path)
    if damage == "altered":
        (folder / "model.safetensors").write_bytes(b"weighty")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage == "half a report":
        (folder / "round.json").write_text((folder / "round.json").read_text()[:-10])
    else:
        (folder / "round.json").write_text("{}")
    named = "round.json" if "report" in damage else "model.safetensors"
    assert RunDirectory(tmp_path).read_report(folder) is None
    assert [record.message for record in caplog.records] == [
        f"{named} in {str(folder)!r} is damaged: the joint retraining is done again."
    ]


def test_a_round_that_was_not_finished_is_no_damage(tmp_path, caplog):
    assert RunDirectory(tmp_path).read_report(tmp_path / "round-01-sparsity-0.5") is None
    assert not caplog.records


@pytest.mark.parametrize("content", ["", "{", "[]", '{"configuration": {}}'])
@pytest.mark.parametrize("name", ["run.json", "extraction/extraction.json"])
def test_settings_that_cannot_be_read_are_refused(tmp_path, name, content):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    (tmp_path / name).write_text(content)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"{name}' is damaged.*Delete the folder"):
        RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, VERSIONS)
    assert files(tmp_path) == before


def test_other_surroundings_are_warned_of(tmp_path, caplog):
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "2", "device": "cpu"})
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "2", "device": "cpu"})
    assert not caplog.records
    RunDirectory(tmp_path).open(CONFIGURATION, EXTRACTION, {"torch": "3", "device": "cpu"})
    assert len(caplog.records) == 2  # of the run, and of its masks
    assert all('torch: "2" there, "3" now' in record.message for record in caplog.records)
    assert all("device" not in record.message for record in caplog.records)


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_of_others(tmp_path, monkeypatch):
    shared = tmp_path / "masks"
    directory = RunDirectory(tmp_path / "run", shared)
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    (tmp_path / "run" / "round-01-sparsity-0.5").mkdir()
    (tmp_path / "run" / ".final-x1y2.tmp").mkdir()
    names = [".run.json.17.tmp", "round-01-sparsity-0.5/.round.json.17.tmp", ".final-x1y2.tmp/model.safetensors"]
    left = [tmp_path / "run" / name for name in names]
    of_others = [tmp_path / "run" / ".editor.tmp", shared / "event-000" / ".notes.tmp"]
    monkeypatch.setattr(hf_rtl.modeling.files.os, "replace", lambda source, target: None)  # killed before the renaming
    for run in ("run", "another"):
        RunDirectory(tmp_path / run, shared).save_masks(0, 0, MASKS)
    monkeypatch.undo()
    written = sorted(shared.glob("event-000/.*.tmp"), key=lambda path: path.stat().st_mtime_ns)
    assert len(written) == 2
    for file in left + of_others:
        file.write_text("")
    directory.open(CONFIGURATION, EXTRACTION, VERSIONS)
    assert not any(file.exists() for file in [*left, written[0]])
    assert all(file.exists() for file in [*of_others, written[1]])


@pytest.mark.parametrize(
    "write", [lambda file: write_json(file, {1: {2}}), lambda file: write_tensors(file, {"x": 1})]
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, write):
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises((TypeError, AttributeError)):
        write(file)
    assert files(tmp_path) == {file: b"before"}


def test_a_disk_that_fails_in_the_last_moment_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, TENSORS)
    before = files(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    for write in (lambda: write_tensors(file, {"x": torch.ones(3)}), lambda: write_json(file, [1])):
        with pytest.raises(OSError):
            write()
        assert files(tmp_path) == before


def test_equal_tensors_give_equal_files(tmp_path):
    command = "import torch; from hf_rtl.modeling.files import write_tensors; from pathlib import Path; import sys; "
    command += "write_tensors(Path(sys.argv[1]), {'b': torch.ones(2), 'a': torch.zeros(3)}, started_from='abc', k='v')"
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", command, str(tmp_path / name)], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
