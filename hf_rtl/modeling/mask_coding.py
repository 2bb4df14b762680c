"""
Masks in files: a bit per weight, or per unit where masks remove whole units, such as the row of an up projection and
the column of a down one. Coded bits are deflated where that is smaller.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_choice
from .mask_bank import MaskBank, integer_dtype, pack, unpack


RAW_CODING, DEFLATE_CODING = "raw", "deflate"
CODINGS = (RAW_CODING, DEFLATE_CODING)
_UNITS = "units-"
UNIT_CODINGS = tuple(_UNITS + coding for coding in CODINGS)

_NUMBER = np.dtype("<i4")


def format_version(codings: Iterable[Any]) -> int:
    """The version of files with these codings: 1, which the first versions read, unless they code units."""
    return 2 if any(coding in UNIT_CODINGS for coding in codings) else 1


# Bytes


def encode(packed: Tensor) -> tuple[str, Tensor]:
    """
    Codes bytes for a file.

    Args:
        packed (`Tensor`): `uint8 [num_bytes]`.

    Returns:
        The coding that gives fewer bytes, one of `CODINGS`, and the coded bytes, `uint8`.
    """
    data = packed.cpu().numpy().tobytes()
    # Bytes of a mask repeat in runs, where a layer is empty or full, but hardly ever as longer strings: a search for
    # those takes 20 times as long, and saves nothing.
    deflater = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_RLE)
    deflated = deflater.compress(data) + deflater.flush()
    if len(deflated) >= len(data):
        return RAW_CODING, packed.cpu()
    return DEFLATE_CODING, torch.from_numpy(np.frombuffer(deflated, np.uint8).copy())


def decode(coding: str, coded: Tensor, num_bytes: int) -> Tensor:
    """
    The bytes that `encode` coded, `uint8 [num_bytes]`.

    Raises:
        ValueError: an unknown coding, or coded bytes that are damaged or not of this length. At most `num_bytes` + 1
            are unpacked.
    """
    check_choice("coding", coding, CODINGS)
    decoded = _decoded(coding, coded, num_bytes)
    if len(decoded) != num_bytes:
        raise _damaged(f"it has {len(decoded)} bytes or more, expected {num_bytes}")
    return decoded


def _decoded(coding: str, coded: Tensor, max_bytes: int) -> Tensor:
    """Decoded bytes; where they are more than `max_bytes`, at least one more than these."""
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError(f"a coded mask must be torch.uint8 [num_bytes], got {coded.dtype} {tuple(coded.shape)}.")
    if coding == RAW_CODING:
        return coded
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(coded.numpy().tobytes(), max_bytes + 1)
    except zlib.error as error:
        raise _damaged(error) from None
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _damaged(reason: Any) -> ValueError:
    return ValueError(f"a coded mask is damaged: {reason}.")


# The mask of a route


def encode_mask(bank: MaskBank, route: int) -> tuple[str, Tensor]:
    """The mask of a route in the coding that gives fewer bytes, one of `CODINGS` or `UNIT_CODINGS`."""
    rows = [rows[route] for rows in bank.packed]
    bits = encode(torch.cat(rows))
    units = encode_units(unpack(row, shape) for row, shape in zip(rows, bank.shapes, strict=True))
    return units if units is not None and units[1].nbytes < bits[1].nbytes else bits


def decode_mask(coding: str, coded: Tensor, bank: MaskBank) -> list[Tensor]:
    """The mask that `encode_mask` coded, `bool` tensors of the shapes of `bank`."""
    check_choice("coding", coding, (*CODINGS, *UNIT_CODINGS))
    if coding in UNIT_CODINGS:
        return list(decode_units(coding, coded, bank.shapes))
    return decode_bits(coding, coded, bank)


def decode_bits(coding: str, coded: Tensor, bank: MaskBank) -> list[Tensor]:
    """The mask, `bool` tensors of the shapes of `bank`, whose packed rows were coded one after the other."""
    sizes = [-(-shape.numel() // 8) for shape in bank.shapes]
    return bank.unpack(decode(coding, coded, sum(sizes)).split(sizes))


# Units: a mask as the outer product of a vector per dimension, which says what is kept along it


def encode_units(masks: Iterable[Tensor]) -> tuple[str, Tensor] | None:
    """
    Codes masks of which each is the outer product of a vector per dimension.

    The bytes are `int32` numbers, little-endian, one for each dimension of each mask, and the packed bits of all
    different vectors, one after the other. Number 0 is a vector of ones, which has no bits; n > 0 is the n-th vector.

    Returns:
        The coding, one of `UNIT_CODINGS`, and the coded bytes, `uint8`. `None` if a mask is no such product.
    """
    vectors = []
    for mask in masks:
        own = _vectors(mask)
        # A mask lies in the outer product of its vectors, so it is the product if it has as many elements.
        if int(mask.sum()) != math.prod(int(vector.sum()) for vector in own):
            return None
        vectors += own
    return _encode_vectors(vectors)


def decode_units(coding: str, coded: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    """
    The masks that `encode_units` coded, `bool` tensors of `shapes`, one at a time.

    Raises:
        ValueError: an unknown coding, or coded bytes that are damaged or do not fit `shapes`. No more is unpacked than
            a bit per index of each dimension, and the numbers.
    """
    check_choice("coding", coding, UNIT_CODINGS)
    sizes = [size for shape in shapes for size in shape]
    start = _NUMBER.itemsize * len(sizes)
    data = _decoded(coding.removeprefix(_UNITS), coded, start + -(-sum(sizes) // 8))
    if len(data) < start:
        raise _damaged(f"it has {len(data)} bytes, expected {start} or more")
    numbers = np.frombuffer(data[:start].numpy().tobytes(), _NUMBER).tolist()
    vectors = _decode_vectors(numbers, sizes, data[start:])
    return (_outer(shape, vectors) for shape in shapes)


def _vectors(mask: Tensor) -> list[Tensor]:
    """For each dimension: which of its indices have an element."""
    dims = range(mask.ndim)
    return [mask.any(dim=[other for other in dims if other != dim]) if mask.ndim > 1 else mask for dim in dims]


def _outer(shape: torch.Size, vectors: Iterator[Tensor]) -> Tensor:
    """The outer product of as many of the vectors as `shape` has dimensions."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim in range(len(shape)):
        mask &= next(vectors).view(-1, *[1] * (len(shape) - dim - 1))
    return mask


def _encode_vectors(vectors: Iterable[Tensor]) -> tuple[str, Tensor]:
    numbers, known, different = [], {}, [torch.empty(0, dtype=torch.bool)]
    for vector in vectors:
        vector = vector.cpu()
        content = vector.numpy().tobytes()
        if not vector.all() and content not in known:
            known[content] = len(different)
            different.append(vector)
        numbers.append(known.get(content, 0))
    header = torch.from_numpy(np.frombuffer(np.array(numbers, _NUMBER).tobytes(), np.uint8).copy())
    coding, coded = encode(torch.cat([header, pack(torch.cat(different))]))
    return _UNITS + coding, coded


def _decode_vectors(numbers: Sequence[int], sizes: Sequence[int], packed: Tensor) -> Iterator[Tensor]:
    """The vectors with these numbers, which must have these sizes."""
    lengths: list[int] = []
    for number, size in zip(numbers, sizes, strict=True):
        if number == len(lengths) + 1:
            lengths.append(size)
        if not 0 <= number <= len(lengths) or (number and lengths[number - 1] != size):
            raise _damaged(f"it has a vector {number} for a dimension of {size}, after vectors of {lengths[-3:]}")
    bits = unpack(packed, (8 * len(packed),))
    if len(packed) != -(-sum(lengths) // 8) or bits[sum(lengths) :].any():
        raise _damaged(f"it has {len(packed)} bytes or more of vectors, expected {sum(lengths)} bits")
    different = bits[: sum(lengths)].split(lengths)
    return (
        different[number - 1] if number else torch.ones(size, dtype=torch.bool)
        for number, size in zip(numbers, sizes, strict=True)
    )


# Rows of private parameters: a refit leaves zeros where it removes units


@dataclass(frozen=True)
class KeptRows:
    """Rows without zeros for removed units: the coding and the coded bytes of masks of what is left, as of units."""

    coding: str
    coded: Tensor
    rows: Sequence[Tensor]
    vectors: list[list[Tensor]]  # of the mask of each row

    @property
    def nbytes(self) -> int:
        sizes = [math.prod(int(vector.sum()) for vector in own) for own in self.vectors]
        return self.coded.nbytes + sum(size * row.itemsize for size, row in zip(sizes, self.rows, strict=True))

    def left(self) -> list[Tensor]:
        """What is left of each row, `[num_left]`."""
        masks = [_outer(row.shape, iter(own)) for row, own in zip(self.rows, self.vectors, strict=True)]
        return [row.detach()[mask.to(row.device)] for row, mask in zip(self.rows, masks, strict=True)]


def encode_rows(rows: Sequence[Tensor]) -> KeptRows | None:
    """
    Leaves out what is zero at an index of a dimension, in rows of two dimensions or more. A zero with a sign stays.
    `None` unless that is smaller.
    """
    vectors = [
        [vector.cpu() for vector in _vectors(row.detach().view(integer_dtype(row.dtype)) != 0)]
        if row.ndim > 1
        else [torch.ones(size, dtype=torch.bool) for size in row.shape]
        for row in rows
    ]
    kept = KeptRows(*_encode_vectors(vector for own in vectors for vector in own), rows, vectors)
    return kept if kept.nbytes < sum(row.nbytes for row in rows) else None


def decode_rows(coding: str, coded: Tensor, shapes: Sequence[torch.Size], left: Tensor) -> list[Tensor]:
    """
    The rows of which `left` are the values, one row after the other. What was left out is zero.

    Raises:
        ValueError: coded bytes that `decode_units` refuses, or another number of values.
    """
    masks = list(decode_units(coding, coded, shapes))
    counts = [int(mask.sum()) for mask in masks]
    if left.shape != (sum(counts),):
        raise _damaged(f"it leaves {sum(counts)} values of private parameters, but there are {tuple(left.shape)}")
    parts = zip(masks, left.split(counts), strict=True)
    return [torch.zeros(mask.shape, dtype=part.dtype).masked_scatter_(mask, part) for mask, part in parts]
