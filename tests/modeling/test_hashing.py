"""Fingerprints of weights: they match after a cast, and do not match after a change."""

import hashlib

import pytest
import torch

from hf_rtl.modeling.hashing import has_hash, hash_tensors, hashes, matches_fingerprint


@pytest.fixture
def tensors():
    return {"weight": torch.randn(7, 11), "bias": torch.randn(11), "positions": torch.arange(4)}


def cast(tensors, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def test_hashes_are_of_names_and_bytes(tensors):
    digest = hashlib.sha256()
    for name in ("bias", "positions", "weight"):
        digest.update(f"{name}|{tensors[name].numel()}|".encode() + tensors[name].numpy().tobytes())
    assert hashes(tensors)["float32"] == digest.hexdigest()[:16]
    assert set(hashes(tensors)) == {"float32", "bfloat16", "float16"}
    assert set(hashes({"": torch.arange(3)})) == {"int64"}


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_in_smaller_types_are_known(tensors, stored, copy):
    exact = {**tensors, "weight": torch.randn(7, 11, dtype=torch.float64)}
    original = cast(exact, stored)
    known = hashes(original)
    both_halves = {stored, copy} == {torch.bfloat16, torch.float16}
    assert matches_fingerprint(cast(original, copy), known) is not both_halves
    # Cast back: the larger type holds the rounded values.
    if copy.itemsize < stored.itemsize:
        assert matches_fingerprint(cast(cast(original, copy), stored), known)
        assert not torch.equal(cast(cast(original, copy), stored)["weight"], original["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_seen(tensors, dtype):
    known = hashes(tensors)
    copy = cast(tensors, dtype)
    assert matches_fingerprint(copy, known)
    for name in copy:
        changed = {**copy, name: copy[name].clone()}
        changed[name].view(-1)[1] *= 2
        changed[name].view(-1)[1] += 1
        assert not matches_fingerprint(changed, known)
    assert not matches_fingerprint({"weight": copy["weight"], "bias": copy["bias"]}, known)
    assert not matches_fingerprint({**copy, "bias": copy["weight"].view(-1)[:11]}, known)
    # The smallest change of a float32 does not show in the rounded values, but must be seen.
    if dtype == torch.float32:
        nudged = {**copy, "bias": torch.nextafter(copy["bias"], torch.tensor(9.0))}
        assert hashes(nudged)["bfloat16"] == known["bfloat16"]
        assert not matches_fingerprint(nudged, known)


def test_shapes_and_memory_layouts_do_not_matter(tensors):
    known = hashes(tensors)
    assert matches_fingerprint({**tensors, "weight": tensors["weight"].view(11, 7)}, known)
    assert matches_fingerprint({**tensors, "weight": tensors["weight"].t().contiguous().t()}, known)
    assert not matches_fingerprint({**tensors, "weight": tensors["weight"].t()}, known)


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


def test_a_file_that_is_missing_or_a_device_has_no_hash(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert has_hash(tmp_path / "file", hashlib.sha256(b"abc").hexdigest())
    assert not has_hash(tmp_path / "file", hashlib.sha256(b"abd").hexdigest())
    for name in ("missing", "/dev/zero", "."):
        assert not has_hash(tmp_path / name, hashlib.sha256(b"").hexdigest())
