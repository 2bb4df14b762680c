"""Masks in files: the code is lossless, small, and never unpacks to more than its announced size."""

import itertools
import math
import zlib

import pytest
import torch

from hf_rtl.modeling.mask_bank import pack
from hf_rtl.modeling.mask_coding import (
    DEFLATE_CODING,
    RAW_CODING,
    decode,
    decode_units,
    encode,
    encode_units,
    format_version,
)


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


# Units


SHAPES = [torch.Size(shape) for shape in [(), (9,), (5, 9), (9, 5, 1, 1), (4, 9, 3, 3), (1, 1), (3, 0), (2, 2, 2)]]


def product(*vectors):
    """The outer product, element by element."""
    mask = torch.zeros([len(vector) for vector in vectors], dtype=torch.bool)
    for place in itertools.product(*(range(len(vector)) for vector in vectors)):
        mask[place] = all(bool(vector[index]) for vector, index in zip(vectors, place, strict=True))
    return mask


@pytest.mark.parametrize("density", [0, 0.3, 0.8, 1])
@pytest.mark.parametrize("num_routes", [1, 3])
def test_products_of_vectors_come_back(density, num_routes):
    shapes = [shape for shape in SHAPES for _ in range(num_routes)]
    masks = [product(*(torch.rand(size) < density for size in shape)) for shape in shapes]
    coding, coded = encode_units(iter(masks))
    assert coded.dtype == torch.uint8 and format_version([RAW_CODING, coding]) == 2
    found = list(decode_units(coding, coded, shapes))
    assert [mask.shape for mask in found] == shapes
    assert all(torch.equal(mask, other) for mask, other in zip(masks, found, strict=True))


@pytest.mark.parametrize("place", range(3))
def test_a_mask_that_is_no_product_is_not_coded_by_units(place):
    masks = [torch.ones(4, 6, dtype=torch.bool) for _ in range(3)]
    assert encode_units(masks) is not None
    masks[place][1, 2] = False
    assert encode_units(masks) is None
    assert encode_units([torch.eye(2, dtype=torch.bool)]) is None
    assert encode_units([torch.tensor(False)]) is None


def test_units_are_coded_once_and_full_dimensions_take_no_bits():
    units = torch.rand(40_000) < 0.5
    full = torch.ones(3, dtype=torch.bool)
    up, down = units[:, None] & full, full[:, None] & units
    coding, coded = encode_units([up, up, down, torch.ones(3, 3, dtype=torch.bool)])
    assert coding == "units-raw" and len(coded) == 8 * 4 + 5000
    assert coded[:32].view(torch.int32).tolist() == [1, 0, 1, 0, 0, 1, 0, 0] and torch.equal(coded[32:], pack(units))
    # One that differs in a single unit is another vector.
    other = units.clone()
    other[-1] ^= True
    assert len(encode_units([up, other[:, None] & full])[1]) == 4 * 4 + 10_000


def test_bits_beyond_the_vectors_are_refused():
    mask = torch.tensor([True, False, True])
    coding, coded = encode_units([mask])
    assert coding == "units-raw" and coded.tolist() == [1, 0, 0, 0, 0b101]
    coded[-1] |= 0b1000
    with pytest.raises(ValueError, match="has 1 bytes or more of vectors, expected 3 bits"):
        decode_units(coding, coded, [mask.shape])
    for wrong in (RAW_CODING, "units-", None):
        with pytest.raises(ValueError, match="must be one of 'units-raw', 'units-deflate', got"):
            decode_units(wrong, coded, [mask.shape])
