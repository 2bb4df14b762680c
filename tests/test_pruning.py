"""Exact counts, positions and schedules, against a reference that sorts Python tuples."""

import math

import pytest
import torch

from hf_rtl.pruning import (
    emptied_layers,
    prune,
    prune_units,
    random_masks,
    round_schedule,
    shuffled_masks,
    unit_activity,
    weight_activity,
)


def full_masks(weights):
    return [torch.ones(weight.shape, dtype=torch.bool) for weight in weights]


def as_lists(masks):
    return [mask.flatten().tolist() for mask in masks]


def naive_prune(weights, masks, num_kept, scope, reference=None):
    """A reference that sorts (magnitude, position) pairs of Python floats, by layer or together."""
    entries = []
    for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        scale = 1.0
        if scope == "global_normalised":
            values = [float(value) for value in reference[layer].flatten()]
            mean = math.fsum(values) / len(values)
            scale = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        for index, (value, kept) in enumerate(zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True)):
            if kept:
                entries.append((-abs(value) / scale, layer, index))
    quotas = {None: num_kept}
    if scope == "layer":
        quotas = dict(enumerate(naive_shares(num_kept, weights, [int(mask.sum()) for mask in masks])))
    chosen = [[False] * weight.numel() for weight in weights]
    for group, quota in quotas.items():
        members = sorted(entry for entry in entries if group is None or entry[1] == group)
        for _, layer, index in members[:quota]:
            chosen[layer][index] = True
    return chosen


def naive_shares(total, weights, survivors):
    """Largest remainder in integers. Layers with too few survivors are kept whole; the rest is shared again."""
    sizes = [weight.numel() for weight in weights]
    filled = {}
    while True:
        rest = [layer for layer in range(len(sizes)) if layer not in filled]
        size = sum(sizes[layer] for layer in rest)
        left = total - sum(filled.values())
        too_many = [layer for layer in rest if left * sizes[layer] > survivors[layer] * size]
        if not too_many:
            break
        filled.update({layer: survivors[layer] for layer in too_many})
    shares = dict(filled)
    for layer in rest:
        shares[layer] = left * sizes[layer] // size
    while sum(shares.values()) < total:
        layer = max(rest, key=lambda layer: (left * sizes[layer] % size, -layer))
        shares[layer] += 1
        rest.remove(layer)
    return [shares[layer] for layer in range(len(sizes))]


def test_global_keeps_the_largest_of_zero_to_nine():
    weights = [torch.tensor([[0.0, -1.0, 2.0], [-3.0, 4.0, -5.0]]), torch.tensor([6.0, -7.0, 8.0, -9.0])]
    masks = prune(weights, full_masks(weights), num_kept=5)
    assert as_lists(masks) == [[False] * 5 + [True], [True] * 4]
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    assert all(mask.dtype == torch.bool for mask in masks)
    again = prune([-weight for weight in weights], masks, num_kept=2)
    assert as_lists(again) == [[False] * 6, [False, False, True, True]]


def test_pruned_weights_do_not_come_back_however_large():
    weights = [torch.tensor([100.0, 1.0, 2.0, float("nan")])]
    masks = [torch.tensor([False, True, True, False])]
    assert as_lists(prune(weights, masks, num_kept=1)) == [[False, False, True, False]]
    assert masks[0].tolist() == [False, True, True, False]  # the arguments do not change


@pytest.mark.parametrize("num_kept", range(9))
def test_ties_keep_the_earlier_position(num_kept):
    weights = [torch.full((2, 2), -3.0), torch.full((4,), 3.0)]
    masks = prune(weights, full_masks(weights), num_kept=num_kept)
    assert sum(as_lists(masks), []) == [True] * num_kept + [False] * (8 - num_kept)


def test_positions_are_row_major_whatever_the_memory_format():
    weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = torch.ones(2, 3, 2, 2, dtype=torch.bool).to(memory_format=torch.channels_last)
    [kept] = prune([weight], [mask], num_kept=5)
    assert kept.reshape(-1).tolist() == [True] * 5 + [False] * 19


@pytest.mark.parametrize("scope", ["global", "layer", "global_normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prune_matches_the_naive_reference(scope, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2,), (5, 2, 2), (7,), (2, 3)]
    for trial in range(20):
        # Coarse values, so that there are many ties within and between layers.
        weights = [torch.randint(-3, 4, shape, generator=generator).to(dtype) / 4 for shape in shapes]
        masks = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
        reference = [torch.randn(shape, generator=generator) * (1 + layer) for layer, shape in enumerate(shapes)]
        num_survivors = sum(int(mask.sum()) for mask in masks)
        for num_kept in {0, 1, num_survivors // 3, num_survivors // 2 + trial % 3, num_survivors - 1, num_survivors}:
            result = prune(weights, masks, num_kept=num_kept, scope=scope, reference=reference)
            assert as_lists(result) == naive_prune(weights, masks, num_kept, scope, reference)
            assert sum(int(mask.sum()) for mask in result) == num_kept
            assert all(not (new & ~old).any() for new, old in zip(result, masks, strict=True))


def naive_rows(scores, masks, num_kept):
    """The shares of layers, then of rows, and in each row the largest scores, the first ones among equals."""
    shares = naive_shares(num_kept, masks, [int(mask.sum()) for mask in masks])
    chosen = []
    for values, mask, share in zip(scores, masks, shares, strict=True):
        rows, row_masks = list(values.flatten(1)), list(mask.flatten(1))
        for row, survivors, quota in zip(
            rows, row_masks, naive_shares(share, rows, [int(one.sum()) for one in row_masks]), strict=True
        ):
            order = sorted((-abs(float(row[i])), i) for i in range(len(row)) if survivors[i])
            kept = {index for _, index in order[:quota]}
            chosen += [index in kept for index in range(len(row))]
    return chosen


@pytest.mark.parametrize("with_scores", [False, True])
def test_row_scope_matches_the_naive_reference(with_scores):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5, 2, 2), (2, 7)]
    for _ in range(20):
        weights = [torch.randint(-3, 4, shape, generator=generator) / 4 for shape in shapes]
        scores = [torch.randint(0, 5, shape, generator=generator).double() for shape in shapes]
        masks = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
        ranked = scores if with_scores else weights
        num_survivors = sum(int(mask.sum()) for mask in masks)
        for num_kept in (0, 1, num_survivors // 2, num_survivors):
            options = {"scores": scores} if with_scores else {}
            result = prune(weights, masks, num_kept=num_kept, scope="row", **options)
            assert [value for mask in as_lists(result) for value in mask] == naive_rows(ranked, masks, num_kept)


def test_among_equals_the_first_of_a_long_row_are_kept():
    weights = [torch.ones(2, 5000)]
    (kept,) = prune(weights, full_masks(weights), num_kept=4000, scope="row")
    assert all(row.tolist() == [True] * 2000 + [False] * 3000 for row in kept)


def test_scores_replace_magnitudes_in_every_scope():
    weights, scores = [torch.tensor([5.0, 4.0, 3.0]), torch.tensor([2.0, 1.0])], [torch.arange(3.0), torch.ones(2)]
    assert as_lists(prune(weights, full_masks(weights), num_kept=3, scores=scores)) == [
        [False, True, True],
        [True, False],
    ]
    with pytest.raises(ValueError, match=r"`scores\[0\]` has NaN"):
        prune(weights, full_masks(weights), num_kept=3, scores=[torch.full((3,), torch.nan), scores[1]])


# Units


def test_a_layer_keeps_its_units_of_largest_score_in_a_multiple():
    scores = [torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 2.0]), torch.arange(20.0)]
    every = [torch.ones(6, dtype=torch.bool), torch.ones(20, dtype=torch.bool)]
    # Half of 6 is 3, and of 20 is 10; multiples of 4 as near are 4, and 12 rather than 8.
    kept = prune_units(scores, every, sparsity=0.5, round_to=4)
    assert [layer.nonzero().flatten().tolist() for layer in kept] == [[0, 2, 3, 5], list(range(8, 20))]
    exact = prune_units(scores, every, sparsity=0.5, round_to=1)
    assert [layer.nonzero().flatten().tolist() for layer in exact] == [[0, 2, 3], list(range(10, 20))]
    # Never none, and never more than there are.
    assert [int(layer.sum()) for layer in prune_units(scores, every, sparsity=0.99, round_to=8)] == [6, 8]
    assert [int(layer.sum()) for layer in prune_units(scores, every, sparsity=0.0, round_to=8)] == [6, 20]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_units_match_the_naive_reference_and_are_nested(scope):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = [torch.randint(0, 6, (size,), generator=generator).double() for size in (9, 5, 12)]
        kept = [torch.ones(len(layer), dtype=torch.bool) for layer in scores]
        for sparsity in (0.3, 0.6):
            quotas = [len(layer) - sparsity * len(layer) for layer in scores]
            groups = [[layer] for layer in range(3)] if scope == "layer" else [range(3)]
            expected = set()
            for group in groups:
                quota = math.floor(quotas[group[0]] + 0.5) if scope == "layer" else 26 - round(26 * sparsity)
                order = sorted(
                    (-float(scores[layer][unit]), layer, unit)
                    for layer in group
                    for unit in range(len(scores[layer]))
                    if kept[layer][unit]
                )
                expected |= {place[1:] for place in order[:quota]}
            if scope == "global" and len({layer for layer, _ in expected}) < 3:
                break
            kept = prune_units(scores, kept, sparsity=sparsity, scope=scope, round_to=1)
            assert {(layer, int(unit)) for layer, one in enumerate(kept) for unit in one.nonzero()} == expected


def test_units_that_cannot_be_pruned_so_are_named():
    scores = [torch.arange(4.0), 10 + torch.arange(4.0)]
    every = [torch.ones(4, dtype=torch.bool)] * 2
    with pytest.raises(ValueError, match=r"`sparsity` = 0.5 would remove all units of layer 0.*scope='layer'"):
        prune_units(scores, every, sparsity=0.5, scope="global")
    with pytest.raises(ValueError, match="the scores of layer 1 are not all finite"):
        prune_units([scores[0], torch.full((4,), torch.inf)], every, sparsity=0.5)
    half = prune_units(scores, every, sparsity=0.5, round_to=1)
    with pytest.raises(ValueError, match=r"keeps 3 units of layer 0, which has only 2 left"):
        prune_units(scores, half, sparsity=0.25, round_to=1)
    with pytest.raises(ValueError, match="`sparsity` is 50; allowed are fractions.*Did you mean 0.5"):
        prune_units(scores, every, sparsity=50)


def test_activity_of_units_in_loops():
    """Two readers: a matrix that reads one input of a unit, and a convolution that reads two."""
    generator = torch.Generator().manual_seed(0)
    squares = [torch.rand(3, 1, generator=generator), torch.rand(3, 2, generator=generator)]
    readers = [torch.randn(3, 1, 4, generator=generator), torch.randn(3, 2, 5, 2, 2, generator=generator)]
    expected = [0.0] * 3
    for mean, weight in zip(squares, readers, strict=True):
        for unit in range(3):
            for place in range(mean.shape[1]):
                norm = math.fsum(float(value) ** 2 for value in weight[unit, place].flatten())
                expected[unit] += float(mean[unit, place]) * norm
    assert unit_activity(squares, readers).tolist() == pytest.approx(expected, rel=1e-12)


def test_activity_of_weights_in_loops():
    """A convolution of two groups: weights [4 outputs, 3 inputs of the group, kernel 2]."""
    generator = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(4, 3, 2, generator=generator), torch.rand(6, 2, generator=generator)
    scores = weight_activity(weight, squares)
    for output in range(4):
        for position in range(3):
            for element in range(2):
                channel = position + 3 * (output // 2)
                expected = abs(float(weight[output, position, element])) * math.sqrt(float(squares[channel, element]))
                assert float(scores[output, position, element]) == pytest.approx(expected, rel=1e-12)


def test_prune_matches_a_stable_sort_on_many_weights():
    weights = [torch.randn(200, 300, generator=torch.Generator().manual_seed(1)), torch.zeros(5000)]
    masks = prune(weights, full_masks(weights), num_kept=61_234)
    order = torch.cat([weight.flatten() for weight in weights]).abs().sort(descending=True, stable=True).indices
    expected = torch.zeros(65_000, dtype=torch.bool)
    expected[order[:61_234]] = True
    assert torch.cat([mask.flatten() for mask in masks]).equal(expected)


def test_layer_scope_shares_by_original_size_with_largest_remainder():
    weights = [torch.arange(10.0), torch.arange(6.0), torch.arange(4.0)]
    # The shares of 7 of 20 are 3.5, 2.1, 1.4 -> 3, 2, 1; the last weight goes to the largest remainder, .5.
    masks = prune(weights, full_masks(weights), num_kept=7, scope="layer")
    assert [int(mask.sum()) for mask in masks] == [4, 2, 1]
    assert masks[0].tolist() == [False] * 6 + [True] * 4
    # Where remainders are equal, .5, the earlier layer gets the weight.
    pair = [torch.arange(3.0), torch.arange(3.0)]
    assert [int(mask.sum()) for mask in prune(pair, full_masks(pair), num_kept=3, scope="layer")] == [2, 1]


def test_layer_scope_gives_the_share_of_nearly_empty_layers_to_the_others():
    weights = [torch.arange(8.0), torch.arange(8.0), torch.arange(8.0)]
    masks = full_masks(weights)
    masks[0][1:] = False
    # Each share is 4, but the first layer has 1. The others share 11: 5.5 each, rounded up in the earlier one.
    assert [int(mask.sum()) for mask in prune(weights, masks, num_kept=12, scope="layer")] == [1, 6, 5]
    # Shares follow the size of layers: with 2 and 8 survivors of 8, 4 kept weights are 2 and 2.
    pair, pair_masks = weights[:2], [torch.arange(8) >= 6, torch.ones(8, dtype=torch.bool)]
    assert [int(mask.sum()) for mask in prune(pair, pair_masks, num_kept=4, scope="layer")] == [2, 2]


def test_normalised_scope_divides_by_the_standard_deviation_of_all_reference_weights():
    weights = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])]
    reference = [torch.tensor([-1.0, 1.0, -1.0, 1.0]), torch.tensor([-20.0, 20.0, -20.0, 20.0])]
    assert as_lists(prune(weights, full_masks(weights), num_kept=4)) == [[False] * 4, [True] * 4]
    masks = prune(weights, full_masks(weights), num_kept=4, scope="global_normalised", reference=reference)
    # Ranked are 1, 2, 3, 4 and .5, 1, 1.5, 2; the tie of 2 and 2 goes to the earlier layer.
    assert as_lists(masks) == [[False, True, True, True], [False, False, False, True]]
    # A mask does not change the standard deviation.
    survivors = [torch.tensor([True, False, True, False]), torch.ones(4, dtype=torch.bool)]
    masks = prune(weights, survivors, num_kept=3, scope="global_normalised", reference=reference)
    assert as_lists(masks) == [[False, False, True, False], [False, False, True, True]]


def test_prune_refuses_bad_input():
    weights = [torch.arange(4.0), torch.tensor([1.0, float("nan")])]
    masks = full_masks(weights)
    with pytest.raises(ValueError, match=r"`weights\[1\]` has NaN"):
        prune(weights, masks, num_kept=1)
    masks[1][1] = False
    assert as_lists(prune(weights, masks, num_kept=1)) == [[False, False, False, True], [False, False]]
    with pytest.raises(ValueError, match="`num_kept` is 6; allowed is 0 to 5"):
        prune(weights, masks, num_kept=6)
    with pytest.raises(ValueError, match="`num_kept` is -1"):
        prune(weights, masks, num_kept=-1)
    with pytest.raises(TypeError, match=r"`num_kept` must be an int, got 2.0, a `float`"):
        prune(weights, masks, num_kept=2.0)
    with pytest.raises(ValueError, match="`scope` must be one of 'global', 'layer', .*got 'local'"):
        prune(weights, masks, num_kept=1, scope="local")
    with pytest.raises(ValueError, match="`reference` is None"):
        prune(weights, masks, num_kept=1, scope="global_normalised")
    with pytest.raises(ValueError, match=r"`reference\[0\]` has standard deviation 0.0"):
        prune(weights, masks, num_kept=1, scope="global_normalised", reference=[torch.ones(4), torch.arange(2.0)])
    with pytest.raises(ValueError, match=r"`reference\[1\]` has standard deviation nan"):
        prune(weights, masks, num_kept=1, scope="global_normalised", reference=weights)
    with pytest.raises(ValueError, match=r"`weights\[0\]` is \[2, 2\] on cpu and `masks\[0\]` \[4\]"):
        prune([weights[0].view(2, 2), weights[1]], masks, num_kept=1)
    with pytest.raises(ValueError, match="`weights` has 1 layers and `masks` 2"):
        prune(weights[:1], masks, num_kept=1)
    with pytest.raises(TypeError, match=r"`masks\[0\]` is a `torch.uint8` tensor"):
        prune(weights, [mask.byte() for mask in masks], num_kept=1)
    with pytest.raises(TypeError, match=r"`weights\[0\]` is a `torch.int64` tensor"):
        prune([weights[0].long(), weights[1]], masks, num_kept=1)
    with pytest.raises(ValueError, match="`masks` is empty"):
        prune([], [], num_kept=0)


def test_constant_schedule_of_the_paper():
    rounds = round_schedule(125_832, [0.25, 0.5, 0.75], prune_schedule="constant", prune_amount=4096)
    assert [len(events) for events in rounds] == [8, 8, 8]
    assert [events[-1] for events in rounds] == [94_374, 62_916, 31_458]
    assert rounds[0] == [125_832 - 4096 * event for event in range(1, 8)] + [94_374]
    assert rounds[1][0] == 94_374 - 4096


def test_geometric_and_linear_schedules():
    assert round_schedule(100, [0.5, 0.6], prune_schedule="geometric", prune_amount=0.2) == [[80, 64, 51, 50], [40]]
    assert round_schedule(100, [0.5, 0.75], prune_schedule="linear", prune_amount=0.2) == [[80, 60, 50], [30, 25]]
    # A fraction of less than half a weight still removes one, so that every schedule ends.
    assert round_schedule(5, [0.8], prune_schedule="geometric", prune_amount=0.01) == [[4, 3, 2, 1]]
    assert round_schedule(5, [0.8], prune_schedule="linear", prune_amount=0.01) == [[4, 3, 2, 1]]


def test_targets_are_counted_on_the_original_number():
    # round() takes halves to even: 2.5 -> 2 removed, 7.5 -> 8 removed.
    assert round_schedule(10, [0.25, 0.75], prune_schedule="linear", prune_amount=0.999) == [[8], [2]]
    assert round_schedule(10, [0.0, 0.3], prune_schedule="constant", prune_amount=4096.0) == [[], [7]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prune_amount": 0.0}, ValueError, "`prune_amount` is 0.0; `prune_schedule` 'geometric' takes a fraction"),
        ({"prune_amount": 1.0}, ValueError, "`prune_amount` is 1.0"),
        ({"prune_amount": float("nan")}, ValueError, "`prune_amount` is nan"),
        ({"prune_amount": 4096}, ValueError, "use 'constant'"),
        ({"prune_amount": 1.0, "prune_schedule": "linear"}, ValueError, "`prune_schedule` 'linear' takes a fraction"),
        ({"prune_amount": 0.2, "prune_schedule": "constant"}, ValueError, "positive whole number"),
        ({"prune_amount": 1.5, "prune_schedule": "constant"}, ValueError, "positive whole number"),
        ({"prune_amount": float("inf"), "prune_schedule": "constant"}, ValueError, "positive whole number"),
        ({"prune_amount": "0.2"}, TypeError, "`prune_amount` must be a number, got '0.2', a `str`"),
        (
            {"prune_schedule": "cubic"},
            ValueError,
            "`prune_schedule` must be one of .*, got 'cubic'",
        ),
        ({"target_sparsity": []}, ValueError, "`target_sparsity` is empty"),
        ({"target_sparsity": 0.5}, TypeError, r"a list is needed: `\[0.5\]`"),
        ({"target_sparsity": ["0.5"]}, TypeError, "`target_sparsity\\[0\\]` must be a number, got '0.5', a `str`"),
        ({"target_sparsity": [0.5, 1.0]}, ValueError, "`target_sparsity` has 1.0"),
        ({"target_sparsity": [90.0]}, ValueError, "`target_sparsity` has 90.0; .* Did you mean 0.9\\?"),
        ({"prune_amount": 20}, ValueError, "`prune_amount` is 20; .* Did you mean 0.2\\?"),
        ({"target_sparsity": [-0.1]}, ValueError, "`target_sparsity` has -0.1"),
        ({"target_sparsity": [float("nan")]}, ValueError, "`target_sparsity` has nan"),
        ({"target_sparsity": [0.5, 0.5]}, ValueError, "must increase strictly"),
        ({"target_sparsity": [0.5, 0.0]}, ValueError, "must increase strictly"),
        ({"target_sparsity": [0.001]}, ValueError, "removes no weight of 100"),
        ({"target_sparsity": [0.5, 0.501]}, ValueError, "beyond the 50 removed before it"),
        ({"target_sparsity": [0.999]}, ValueError, "keeps none of 100 weights"),
        ({"num_weights": 0}, ValueError, "`num_weights` is 0"),
        ({"num_weights": 1e6}, TypeError, "`num_weights` must be an int, got 1000000.0, a `float`"),
    ],
)
def test_round_schedule_refuses_bad_input(arguments, error, message):
    arguments = {
        "num_weights": 100,
        "target_sparsity": [0.5],
        "prune_schedule": "geometric",
        "prune_amount": 0.2,
    } | arguments
    num_weights, targets = arguments.pop("num_weights"), arguments.pop("target_sparsity")
    with pytest.raises(error, match=message):
        round_schedule(num_weights, targets, **arguments)


def test_random_masks_keep_the_total_uniformly():
    masks = [torch.zeros(2, 3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        drawn = random_masks(masks, generator=generator)
        assert [mask.shape for mask in drawn] == [mask.shape for mask in masks]
        assert sum(int(mask.sum()) for mask in drawn) == 4
        counts += torch.cat([mask.flatten() for mask in drawn])
    # 2000 draws of probability .4: the standard deviation is 22.
    assert (counts - 800).abs().max() < 110
    same = [random_masks(masks, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert as_lists(same[0]) == as_lists(same[1]) != as_lists(random_masks(masks, generator=generator))
    more = [torch.ones(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)]
    six = random_masks(more, generator=torch.Generator().manual_seed(7))
    assert all(not (four & ~wider).any() for four, wider in zip(same[0], six, strict=True))


def test_shuffled_masks_keep_each_layers_count_at_other_positions():
    masks = [torch.arange(10) < 3, (torch.arange(8) < 6).view(2, 4), torch.zeros(5, dtype=torch.bool)]
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        shuffled = shuffled_masks(masks, generator=generator)
        assert [int(mask.sum()) for mask in shuffled] == [3, 6, 0]
        assert [mask.shape for mask in shuffled] == [mask.shape for mask in masks]
        counts += shuffled[0]
    assert (counts - 600).abs().max() < 100  # probability .3, standard deviation 20
    same = [shuffled_masks(masks, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert as_lists(same[0]) == as_lists(same[1])


def test_random_and_shuffled_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    masks = [torch.arange(10) < 3]
    random_masks(masks, generator=torch.Generator().manual_seed(0))
    shuffled_masks(masks, generator=torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(before)


def test_emptied_layers():
    masks = [torch.tensor([False, True]), torch.zeros(3, dtype=torch.bool), torch.ones(1, dtype=torch.bool)]
    assert emptied_layers(masks) == [1]
    assert emptied_layers([~mask for mask in masks]) == [2]
    with pytest.raises(TypeError, match=r"`masks\[0\]` is a `torch.float32` tensor"):
        emptied_layers([torch.zeros(3)])
