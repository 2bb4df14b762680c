"""Files are written whole or not at all, and read only if they are whole."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_rtl.modeling.files
from hf_rtl.modeling.files import read_json, read_tensors, write_json, write_tensors
from hf_rtl.modeling.hashing import hash_tensors


TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([-0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bits": torch.arange(256).to(torch.uint8),
    "nothing": torch.zeros(0, 5),
    "mask": torch.tensor([True, False]),
}


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
    """A partly written file never has the final name."""
    seen = []

    def watched(tensors, path, **kwargs):
        seen.append(os.fspath(path))
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(hf_rtl.modeling.files, "save_file", watched)
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert len(seen) == 1
    assert os.path.basename(seen[0]) != "x.safetensors"
    assert os.path.dirname(seen[0]) == str(tmp_path)  # Both names are in one folder, so renaming is atomic.


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
    """Also in the order of names and metadata in the header, which safetensors alone draws anew in every call."""
    contents = set()
    for number in range(8):
        tensors, metadata = {"b": torch.ones(2), "a": torch.zeros(3)}, {"started_from": "abc", "k": "v", "z": "y"}
        if number % 2:
            tensors, metadata = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
        write_tensors(tmp_path / "file", tensors, **metadata)
        contents.add((tmp_path / "file").read_bytes())
    assert len(contents) == 1


def test_json_that_is_none_or_too_deep_is_one_kind_of_error(tmp_path):
    file = tmp_path / "file.json"
    write_json(file, {"a": [1, None]})
    assert read_json(file) == {"a": [1, None]}
    for content in (b"", b"{", b"\xff", b"9" * 5000, b"[" * 10**5 + b"]" * 10**5):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            read_json(file)
