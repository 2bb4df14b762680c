"""Lossless coding of packed masks for files: deflate, where it is smaller than the bits themselves."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


RAW, DEFLATE = "raw", "deflate"
CODINGS = (RAW, DEFLATE)


def encode(packed: Tensor) -> tuple[str, Tensor]:
    """
    Codes bytes for a file.

    Args:
        packed (`Tensor`): `uint8 [num_bytes]`.

    Returns:
        The name of the coding, one of `CODINGS`, and the coded bytes, `uint8`. The shorter one is taken.
    """
    data = packed.cpu().numpy().tobytes()
    # Bytes of a mask repeat in runs, where a layer is empty or full, but hardly ever as longer strings: a search for
    # those takes 20 times as long, and saves nothing.
    deflater = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_RLE)
    deflated = deflater.compress(data) + deflater.flush()
    if len(deflated) >= len(data):
        return RAW, packed.cpu()
    return DEFLATE, torch.from_numpy(np.frombuffer(deflated, np.uint8).copy())


def decode(coding: str, coded: Tensor, num_bytes: int) -> Tensor:
    """
    The bytes that `encode` coded, `uint8 [num_bytes]`.

    Raises:
        ValueError: an unknown coding, or what is coded is damaged or not of this length. No more than `num_bytes` are
            ever unpacked.
    """
    if coding not in CODINGS:
        raise ValueError(f"the coding of a mask must be one of {', '.join(map(repr, CODINGS))}, got {coding!r}.")
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError(f"a coded mask must be torch.uint8 [num_bytes], got {coded.dtype} {tuple(coded.shape)}.")
    if coding == DEFLATE:
        inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            # One byte more, to see what is too long.
            data = inflater.decompress(coded.numpy().tobytes(), num_bytes + 1)
        except zlib.error as error:
            raise ValueError(f"a coded mask is damaged: {error}.") from None
        coded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    if len(coded) != num_bytes:
        raise ValueError(f"a coded mask is damaged: it has {len(coded)} bytes or more, expected {num_bytes}.")
    return coded
