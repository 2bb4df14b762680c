"""Hashes of files, of tensors, and of weights; those of weights still match after a cast to a smaller type."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


# Types that weights are stored in and cast to.
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hash_parts(parts: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over texts, each followed by the bytes of a tensor."""
    digest = hashlib.sha256()
    for text, tensor in parts:
        digest.update(text.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    named = sorted(tensors.items())
    return hash_parts((f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|", tensor) for name, tensor in named)


def hash_file(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def has_hash(file: Path, expected: str) -> bool:
    """Whether there is a file with this [`hash_file`]. Devices, which may never end, are not read."""
    return file.is_file() and hash_file(file) == expected


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """
    Hashes of tensors as they are stored, and as they would be stored after a cast: a type, such as `"float32"` -> the
    first 64 bits of the SHA-256 of their names and bytes. Shapes do not count.
    """
    return {_name(dtype): _hash(tensors, dtype) for dtype in _casts(tensors)}


def matches_fingerprint(tensors: Mapping[str, Tensor], known: Mapping[str, str]) -> bool:
    """
    Whether `tensors` are those with the [`hashes`] `known`, or those rounded to a smaller type, even if the rounded
    ones were cast back.
    """
    return any(
        _name(dtype) in known
        and known[_name(dtype)] == _hash(tensors, dtype)
        and all(torch.equal(_cast(tensor, dtype).to(tensor.dtype), tensor) for tensor in tensors.values())
        for dtype in _casts(tensors)
    )


def _casts(tensors: Mapping[str, Tensor]) -> list[torch.dtype]:
    """The largest type of the tensors, then all that have fewer bits."""
    largest = max((tensor.dtype for tensor in tensors.values()), key=_rank)
    return [largest, *(dtype for dtype in _FLOATS if dtype.itemsize < _rank(largest)[1])]


def _rank(dtype: torch.dtype) -> tuple[bool, int]:
    return dtype.is_floating_point, dtype.itemsize if dtype.is_floating_point else 0


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if _rank(tensor.dtype) > _rank(dtype) else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    stored = ((name, _cast(tensors[name].detach(), dtype)) for name in sorted(tensors))
    return hash_parts((f"{name}|{tensor.numel()}|", tensor) for name, tensor in stored)[:16]
