"""The mask bank against numpy's bit packing and against sets of Python integers."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch

from hf_rtl import MaskBank
from hf_rtl.modeling.mask_bank import (
    byte_blocks,
    check_route_names,
    count_bits,
    integer_dtype,
    pack,
    unpack,
    unpack_as_integers,
)


# Sizes 15, 16, 1, 0 and 7: whole bytes, parts of bytes, a single weight, none at all.
SHAPES = [(3, 5), (4, 2, 2), (1, 1), (0, 3), (7,)]
NAMES = [f"layer{index}.weight" for index in range(len(SHAPES))]


def random_bank(num_routes: int, keep: float = 0.5, seed: int = 0) -> tuple[MaskBank, list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    masks = [[torch.rand(shape, generator=generator) < keep for shape in SHAPES] for _ in range(num_routes)]
    bank = MaskBank(list(zip(NAMES, SHAPES, strict=True)), [f"r{route}" for route in range(num_routes)])
    for route, mask in enumerate(masks):
        bank[route] = mask
    return bank, masks


def kept(mask: torch.Tensor) -> set[int]:
    """Positions of the kept weights."""
    return {position for position, value in enumerate(mask.flatten().tolist()) if value}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else math.nan


def everything(masks: list[torch.Tensor]) -> set[tuple[int, int]]:
    """(layer, position) of the kept weights."""
    return {(layer, position) for layer, mask in enumerate(masks) for position in kept(mask)}


def assert_masks_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bool and torch.equal(one, other)


def banks():
    return [
        random_bank(routes, keep, seed)
        for seed, (routes, keep) in enumerate(itertools.product((1, 2, 3, 8), (0.5, 0.1)))
    ]


# Packing


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (16,), (3, 5), (2, 3, 4, 5), (0,), (0, 3), (1000,)])
def test_pack_is_numpys_little_packbits(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert torch.equal(unpack(packed, shape), mask)


def test_pack_is_numpys_for_every_byte():
    mask = torch.tensor(list(itertools.product([False, True], repeat=8)))
    assert np.array_equal(pack(mask).numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


@pytest.mark.parametrize("num_weights", range(1, 18))
def test_padding_bits_are_zero(num_weights):
    packed = pack(torch.ones(num_weights, dtype=torch.bool))
    assert packed.sum().item() == 255 * (num_weights // 8) + (2 ** (num_weights % 8) - 1)


def test_pack_takes_any_strides():
    mask = torch.rand(6, 7) < 0.5
    assert torch.equal(unpack(pack(mask.t()), (7, 6)), mask.t())


@pytest.mark.parametrize(
    "dtype, integers",
    [
        (torch.float64, torch.int64),
        (torch.float32, torch.int32),
        (torch.float16, torch.int16),
        (torch.bfloat16, torch.int16),
        (torch.float8_e4m3fn, torch.int8),
    ],
)
def test_unpack_as_integers_has_all_bits_or_none(dtype, integers):
    mask = torch.rand(3, 7) < 0.5
    unpacked = unpack_as_integers(pack(mask), mask.shape, dtype)
    assert unpacked.dtype == integer_dtype(dtype) == integers
    assert torch.equal(unpacked, -mask.to(integers))


def test_count_bits_of_every_byte():
    expected = [bin(byte).count("1") for byte in range(256)]
    assert count_bits(torch.arange(256, dtype=torch.uint8)[:, None]).tolist() == expected
    assert count_bits(torch.full((2, 1000), 255, dtype=torch.uint8)).tolist() == [8000, 8000]


# Reading


def test_a_new_bank_keeps_everything_with_zero_padding():
    bank = MaskBank(list(zip(NAMES, SHAPES, strict=True)), ["a", "b"])
    for shape, rows, name in zip(SHAPES, bank.packed, [f"m000{i}" for i in range(5)], strict=True):
        assert rows is bank.get_buffer(name)
        assert rows.dtype == torch.uint8 and rows.shape == (2, -(-math.prod(shape) // 8))
        expected = np.packbits(np.ones(math.prod(shape), dtype=bool), bitorder="little")
        assert all(np.array_equal(row, expected) for row in rows.numpy())
    assert list(bank.state_dict()) == ["m0000", "m0001", "m0002", "m0003", "m0004"]
    assert bank.num_weights == 39 and bank.num_routes == 2
    assert_masks_equal(bank["b"], [torch.ones(shape, dtype=torch.bool) for shape in SHAPES])


@pytest.mark.parametrize("num_routes", [1, 2, 3, 8])
def test_masks_come_back_by_index_and_by_name(num_routes):
    bank, masks = random_bank(num_routes)
    for route, mask in enumerate(masks):
        assert_masks_equal(bank[route], mask)
        assert_masks_equal(bank[f"r{route}"], mask)
    assert_masks_equal(bank[torch.tensor(num_routes - 1)], masks[-1])
    assert_masks_equal(bank[np.int64(num_routes - 1)], masks[-1])


def test_counts_and_densities_against_brute_force():
    for bank, masks in banks():
        counts = [[len(kept(mask[layer])) for mask in masks] for layer in range(len(SHAPES))]
        assert bank.count(per_layer=True).tolist() == counts
        assert bank.count(per_layer=True).dtype == torch.int64
        assert bank.count().tolist() == [sum(column) for column in zip(*counts, strict=True)]
        densities = bank.density(per_layer=True)
        assert densities.dtype == torch.float64
        for layer, shape in enumerate(SHAPES):
            for route in range(len(masks)):
                size, found = math.prod(shape), densities[layer, route].item()
                assert math.isnan(found) if size == 0 else found == counts[layer][route] / size
        assert bank.density().tolist() == [sum(column) / 39 for column in zip(*counts, strict=True)]


def test_union_core_and_exclusive_against_brute_force():
    for bank, masks in banks():
        for layer in range(len(SHAPES)):
            sets = [kept(mask[layer]) for mask in masks]
            assert kept(bank.union()[layer]) == set.union(*sets)
            assert kept(bank.core()[layer]) == set.intersection(*sets)
            for route, own in enumerate(sets):
                others = set().union(*(other for index, other in enumerate(sets) if index != route))
                assert kept(bank.exclusive(route)[layer]) == own - others
        wholes = [everything(mask) for mask in masks]
        assert bank.union_count() == len(set.union(*wholes))
        assert bank.core_count() == len(set.intersection(*wholes))
        assert [mask.shape for mask in bank.union()] == [torch.Size(shape) for shape in SHAPES]


def test_packed_union_of_some_routes():
    bank, masks = random_bank(8)
    for routes in ([3], [0, 5], [7, 2, 2], range(8)):
        for layer, (row, shape) in enumerate(zip(bank.packed_union(routes), SHAPES, strict=True)):
            assert kept(unpack(row, shape)) == set().union(*(kept(masks[route][layer]) for route in routes))


def test_reading_changes_nothing():
    bank, _ = random_bank(3)
    before = [rows.clone() for rows in bank.packed]
    for result in (bank.union(), bank.core(), bank.exclusive(0), bank[0], bank.packed_union(), bank.packed_union([1])):
        for tensor in result:
            tensor.fill_(0)
    assert all(torch.equal(rows, old) for rows, old in zip(bank.packed, before, strict=True))


def test_similarity_against_brute_force():
    for bank, masks in banks():
        similarity, per_layer = bank.similarity(), bank.similarity(per_layer=True)
        assert similarity.dtype == per_layer.dtype == torch.float64
        for i, j in itertools.product(range(len(masks)), repeat=2):
            expected = jaccard(everything(masks[i]), everything(masks[j]))
            np.testing.assert_equal(similarity[i, j].item(), expected)
            for layer in range(len(SHAPES)):
                expected = jaccard(kept(masks[i][layer]), kept(masks[j][layer]))
                np.testing.assert_equal(per_layer[layer, i, j].item(), expected)


def test_similarity_of_empty_layers_is_nan():
    bank, masks = random_bank(3)
    for route in (0, 1):
        masks[route][1] = torch.zeros(SHAPES[1], dtype=torch.bool)
        bank[route] = masks[route]
    masks[2][1] = torch.ones(SHAPES[1], dtype=torch.bool)
    bank[2] = masks[2]
    layer = bank.similarity(per_layer=True)[1]
    assert layer[:2, :2].isnan().all() and layer[2].tolist() == [0, 0, 1]
    assert bank.chance_similarity(per_layer=True)[1, 0, 1].isnan()
    assert not bank.similarity().isnan().any()
    for route in range(3):
        bank[route] = [torch.zeros(shape, dtype=torch.bool) for shape in SHAPES]
    assert bank.similarity().isnan().all() and bank.chance_similarity().isnan().all()


def test_similarity_over_several_blocks(monkeypatch):
    bank, masks = random_bank(3)
    blocks = "hf_rtl.modeling.mask_bank.byte_blocks"
    monkeypatch.setattr(blocks, lambda num_bytes, _: (slice(b, b + 1) for b in range(num_bytes)))
    assert bank.similarity()[0, 2].item() == jaccard(everything(masks[0]), everything(masks[2]))


@pytest.mark.parametrize(
    "num_bytes, num_routes", [(1, 1), (2**18, 1), (2**18 + 1, 1), (1000, 2**18), (5, 2**20), (0, 3)]
)
def test_blocks_cover_every_byte_once(num_bytes, num_routes):
    covered = [byte for block in byte_blocks(num_bytes, num_routes) for byte in range(num_bytes)[block]]
    assert covered == list(range(num_bytes))


def expectation_by_enumeration(kept, sizes):
    """The expected similarity of two random masks with `kept` [(a, b), …] weights in layers of `sizes`, as a sum."""
    chances = {0: 1.0}  # number of weights that both keep in the layers so far -> probability
    for (a, b), size in zip(kept, sizes, strict=True):
        longer = collections.Counter()
        for both in range(max(0, a + b - size), min(a, b) + 1):
            ways = math.comb(a, both) * math.comb(size - a, b - both) / math.comb(size, b)
            for before, chance in chances.items():
                longer[before + both] += chance * ways
        chances = longer
    total = sum(map(sum, kept))
    return sum(chance * both / (total - both) for both, chance in chances.items())


def test_chance_similarity_is_that_of_masks_with_the_same_densities_in_every_layer():
    sizes, densities = (400, 400, 30), [(0.9, 0.8), (0.1, 0.2), (0.5, 0.5)]
    masks = {
        name: [torch.arange(n) < round(n * pair[k]) for n, pair in zip(sizes, densities, strict=True)]
        for k, name in enumerate("ab")
    }
    bank = MaskBank.from_masks(["x", "y", "z"], masks)
    chance, per_layer = bank.chance_similarity(), bank.chance_similarity(per_layer=True)
    counts = [tuple(round(n * density) for density in pair) for n, pair in zip(sizes, densities, strict=True)]
    assert chance[0, 1].item() == chance[1, 0].item()
    assert chance[0, 1].item() == pytest.approx(expectation_by_enumeration(counts, sizes), abs=1e-5)
    for layer, tolerance in enumerate((1e-5, 2e-4, 2e-3)):
        expected = expectation_by_enumeration(counts[layer : layer + 1], sizes[layer : layer + 1])
        assert per_layer[layer, 0, 1].item() == pytest.approx(expected, abs=tolerance)
    # A single density over all layers would give another value.
    p, q = (sum(count[k] for count in counts) / sum(sizes) for k in (0, 1))
    assert abs(p * q / (p + q - p * q) - chance[0, 1].item()) > 0.2


def test_chance_similarity_is_what_random_masks_have():
    """Two layers that keep nine tenths and one tenth: far more similar than masks with one density over both."""
    torch.manual_seed(1)
    drawn = {name: [torch.rand(200, 200) < density for density in (0.9, 0.1)] for name in "ab"}
    bank = MaskBank.from_masks(["x", "y"], drawn)
    assert bank.similarity()[0, 1].item() == pytest.approx(bank.chance_similarity()[0, 1].item(), abs=0.01)
    assert bank.chance_similarity()[0, 1].item() > 0.6


# Changing


def test_from_masks():
    _, masks = random_bank(3)
    bank = MaskBank.from_masks(NAMES, {name: mask for name, mask in zip("abc", masks, strict=True)})
    assert bank.route_names == ["a", "b", "c"] and bank.weight_names == NAMES
    for route, mask in enumerate(masks):
        assert_masks_equal(bank[route], mask)


def test_setting_a_route_leaves_the_others():
    bank, masks = random_bank(3)
    new = [~mask for mask in masks[1]]
    bank["r1"] = new
    assert_masks_equal(bank[0], masks[0])
    assert_masks_equal(bank[1], new)
    assert_masks_equal(bank[2], masks[2])
    bank.validate()  # All bits of the last byte are flipped, but its padding is still zero.


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda masks: masks[:-1], "4 tensors, expected 5"),
        (lambda masks: [*masks[:-1], masks[-1].float()], "layer4.weight is torch.float32"),
        (lambda masks: [*masks[:-1], masks[-1].to(torch.uint8)], "layer4.weight is torch.uint8"),
        (
            lambda masks: [*masks[:-1], masks[-1][:-1]],
            r"layer4.weight is torch.bool \(6,\), expected torch.bool \(7,\)",
        ),
        (lambda masks: [masks[0].t(), *masks[1:]], r"layer0.weight is torch.bool \(5, 3\)"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(spoil, message):
    bank, masks = random_bank(2)
    before = bank.fingerprint()
    wrong = spoil([~mask for mask in masks[0]])
    with pytest.raises(ValueError, match=message):
        bank[0] = wrong
    with pytest.raises(ValueError, match=message):
        bank.add_route("new", wrong)
    assert bank.fingerprint() == before and bank.route_names == ["r0", "r1"]


def test_add_drop_reorder_and_rename():
    bank, masks = random_bank(3)
    new = [~mask for mask in masks[0]]
    bank.add_route("new", new)
    assert bank.route_names == ["r0", "r1", "r2", "new"]
    bank.drop_route("r1")
    assert bank.route_names == ["r0", "r2", "new"]
    bank.reorder(["new", 0, "r2"])
    assert bank.route_names == ["new", "r0", "r2"]
    bank.rename_route("r0", "old")
    assert bank.route_names == ["new", "old", "r2"] and bank.num_routes == 3
    bank.validate()
    for name, mask in (("new", new), ("old", masks[0]), ("r2", masks[2])):
        assert_masks_equal(bank[name], mask)
    assert bank.count().tolist() == [len(everything(mask)) for mask in (new, masks[0], masks[2])]
    bank.drop_route(0)
    bank.drop_route("r2")
    assert bank.route_names == ["old"]
    with pytest.raises(ValueError, match="needs at least one route"):
        bank.drop_route("old")
    assert_masks_equal(bank[0], masks[0])


def test_every_change_is_counted():
    """A tensor's version counter misses writes in inference mode, so caches of masks compare this count too."""
    bank, masks = random_bank(2)
    counts = [bank.num_changes]
    for change in (
        lambda: bank.__setitem__(0, masks[1]),
        lambda: bank.add_route("new", masks[0]),
        lambda: bank.reorder([2, 1, 0]),
        lambda: bank.drop_route(0),
    ):
        with torch.inference_mode():
            change()
        counts.append(bank.num_changes)
    assert sorted(set(counts)) == counts


# Fingerprint


def test_fingerprint_depends_on_bits_names_shapes_order_and_number_of_routes():
    bank, masks = random_bank(2)
    weights = list(zip(NAMES, SHAPES, strict=True))

    def fingerprint(weights=weights, routes=("r0", "r1"), masks=masks):
        other = MaskBank(weights, routes)
        for route in range(len(routes)):
            other[route] = [mask.reshape(shape) for mask, (_, shape) in zip(masks[route], weights, strict=True)]
        return other.fingerprint()

    same = bank.fingerprint()
    assert len(same) == 64 and fingerprint() == same
    assert fingerprint(routes=("other", "names")) == same
    renamed = [("another.weight", SHAPES[0]), *weights[1:]]
    reshaped = [(NAMES[0], (5, 3)), *weights[1:]]
    # Two layers of equal size that swap places, with their masks.
    exchanged, exchanged_masks = [weights[1], weights[0], *weights[2:]], [[m[1], m[0], *m[2:]] for m in masks]
    all_of_them = [
        same,
        fingerprint(weights=renamed),
        fingerprint(weights=reshaped),
        fingerprint(weights=exchanged, masks=exchanged_masks),
        fingerprint(masks=masks[::-1]),
        fingerprint(routes=("r0",)),
        fingerprint(routes=("a", "b", "c"), masks=[*masks, masks[0]]),
    ]
    for layer, shape in enumerate(SHAPES):
        for position in range(math.prod(shape)):
            flipped = [mask.clone() for mask in masks[1]]
            flipped[layer].view(-1)[position] ^= True
            all_of_them.append(fingerprint(masks=[masks[0], flipped]))
    assert len(set(all_of_them)) == len(all_of_them) == 7 + 39


def test_fingerprint_survives_casts_and_copies():
    bank, _ = random_bank(3)
    before = bank.fingerprint()
    assert bank.half().fingerprint() == bank.to(torch.float64).fingerprint() == before
    other, _ = random_bank(3, seed=1)
    other.load_state_dict(bank.state_dict())
    assert other.fingerprint() == before


# Errors


def test_unknown_routes():
    bank, masks = random_bank(3)
    for route in ("r3", "", "R0"):
        with pytest.raises(ValueError, match=r"unknown route.*'r0', 'r1', 'r2'"):
            bank[route]
    for route in (3, -1, 100):
        with pytest.raises(ValueError, match=rf"route {route} is out of range; allowed are 0 to 2"):
            bank[route]
    for route in (True, None, 1.0, [0], torch.tensor(True), torch.tensor(1.0), torch.tensor([0, 1]), np.array([0, 1])):
        with pytest.raises(TypeError, match="a route is a name or an index"):
            bank[route]
    for act in (
        bank.exclusive,
        bank.drop_route,
        lambda r: bank.rename_route(r, "x"),
        lambda r: bank.reorder([0, 1, r]),
    ):
        with pytest.raises(ValueError, match="unknown route"):
            act("nobody")
    with pytest.raises(ValueError, match="unknown route"):
        bank["nobody"] = masks[0]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "`route_names` is empty"),
        (["a", "a", "b"], "has 'a' more than once"),
        (["a", ""], "non-empty strings"),
        (["a", 1], "non-empty strings"),
        (["a", None], "non-empty strings"),
        ("abc", "must be a list"),
    ],
)
def test_bad_route_names(names, message):
    with pytest.raises(ValueError, match=message):
        check_route_names(names)
    with pytest.raises(ValueError, match=message):
        MaskBank(list(zip(NAMES, SHAPES, strict=True)), names)


def test_bad_names_and_orders_change_nothing():
    bank, masks = random_bank(3)
    before = bank.fingerprint()
    for act in (
        lambda: bank.add_route("r1", masks[0]),
        lambda: bank.add_route("", masks[0]),
        lambda: bank.rename_route("r0", "r2"),
        lambda: bank.rename_route("r0", ""),
        lambda: bank.reorder([0, 1]),
        lambda: bank.reorder([0, 1, 1]),
        lambda: bank.reorder([0, 1, 2, 2]),
        lambda: bank.reorder([]),
    ):
        with pytest.raises(ValueError):
            act()
    assert bank.fingerprint() == before and bank.route_names == ["r0", "r1", "r2"]
    bank.rename_route("r0", "r0")
    assert bank.route_names == ["r0", "r1", "r2"]


def test_from_masks_without_masks():
    with pytest.raises(ValueError, match="`masks` is empty"):
        MaskBank.from_masks(NAMES, {})


def test_validate():
    bank, _ = random_bank(3)
    bank.validate()
    bank.validate(bank.fingerprint())
    with pytest.raises(
        ValueError, match="`mask_fingerprint` of the configuration is 0{16}…: the masks belong to another model"
    ):
        bank.validate("0" * 64)
    good = bank.m0000
    for bad, message in (
        (good.float(), r"m0000 \(layer0.weight\) is torch.float32"),
        (good.to(torch.int8), "torch.int8"),
        (good[:2], r"\(2, 2\), expected torch.uint8 \(3, 2\)"),
        (good[:, :1], r"\(3, 1\), expected torch.uint8 \(3, 2\)"),
    ):
        bank.m0000 = bad
        with pytest.raises(ValueError, match=message):
            bank.validate()
    bank.m0000 = good
    for bit in range(15, 16):
        spoilt = good.clone()
        spoilt[1, -1] |= 1 << (bit % 8)
        bank.m0000 = spoilt
        with pytest.raises(ValueError, match=r"m0000 \(layer0.weight\) has padding bits set"):
            bank.validate()
    bank.m0000 = good
    bank.validate()


def test_packed_rows_fit_if_they_are_those_of_a_mask():
    bank = MaskBank([("a", (3, 5)), ("b", (8,))], ["x"])
    packed = bank.pack([torch.rand(3, 5) < 0.5, torch.rand(8) < 0.5])
    assert bank.fits(packed)
    padding = packed[0].clone()
    padding[1] |= 0x80
    for wrong in (
        packed[:1],
        [*packed, packed[0]],
        [packed[0][:1], packed[1]],
        [packed[0][None], packed[1]],
        [packed[0].to(torch.int32), packed[1]],
        [padding, packed[1]],
    ):
        assert not bank.fits(wrong)
