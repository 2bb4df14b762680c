"""Masks in files: the code is lossless, small, and never unpacks to more than its announced size."""

import math
import zlib

import pytest
import torch

from hf_rtl.modeling.mask_bank import pack
from hf_rtl.modeling.mask_coding import DEFLATE_CODING, RAW_CODING, decode, encode


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.9, 1])
@pytest.mark.parametrize("num_bits", [1, 8, 1001, 80_000])
def test_coded_masks_come_back(density, num_bits):
    packed = pack(torch.rand(num_bits) < density)
    coding, coded = encode(packed)
    assert torch.equal(decode(coding, coded, len(packed)), packed)
    assert len(coded) <= len(packed) and coded.dtype == torch.uint8
    assert coding == (RAW_CODING if len(coded) == len(packed) else DEFLATE_CODING)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_code_is_near_the_entropy(density):
    """The entropy of independent bits is the smallest possible size."""
    packed = pack(torch.rand(800_000) < density)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert entropy * 0.99 < len(encode(packed)[1]) / len(packed) < entropy * 1.05


def test_nothing_is_unpacked_beyond_what_was_announced():
    """The code has a few kilobytes, but would fill the memory."""
    deflater = zlib.compressobj(wbits=-15)
    bomb = deflater.compress(bytes(2**26)) + deflater.flush()
    with pytest.raises(ValueError, match="damaged: it has 101 bytes or more, expected 100"):
        decode(DEFLATE_CODING, torch.frombuffer(bytearray(bomb), dtype=torch.uint8), 100)


def test_damaged_codes_are_refused():
    packed = pack(torch.rand(8000) < 0.1)
    coding, coded = encode(packed)
    assert coding == DEFLATE_CODING
    for wrong, message in (
        ((coding, coded[:-20], 1000), "damaged"),
        ((coding, coded.flip(0), 1000), "damaged"),
        ((coding, coded, 999), "has 1000 bytes or more, expected 999"),
        ((RAW_CODING, packed, 1001), "has 1000 bytes or more, expected 1001"),
        ((RAW_CODING, packed.float(), 1000), r"must be torch.uint8 \[num_bytes\], got torch.float32 \(1000,\)"),
        (("pickle", coded, 1000), "must be one of 'raw', 'deflate', got 'pickle'"),
        ((None, coded, 1000), "must be one of 'raw', 'deflate', got None"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(*wrong)
