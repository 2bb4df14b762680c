"""Similarity beyond chance, its sharp changes, and its alignment with that of classes."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, spearmanr

from hf_rtl import MaskBank
from hf_rtl.analysis import (
    depth_thirds,
    detect_change,
    detect_collapse,
    expected_jaccard,
    expected_jaccard_of_layers,
    layer_similarity,
    semantic_alignment,
    similarity_by_depth,
    spearman,
    ticket_similarity,
)
from hf_rtl.pruning import emptied_layers, prune, random_masks, round_schedule, shuffled_masks


SHAPES = [(40, 30), (1000,), (60, 40), (400,)]
SIZES = [math.prod(shape) for shape in SHAPES]
NUM_WEIGHTS = sum(SIZES)
ROUTES = ["cat", "dog", "owl", "fox"]
# Weights kept after each prune event: by the default schedule, and by one of equal steps such as the paper's.
SCHEDULES = {
    "geometric": round_schedule(NUM_WEIGHTS, [0.95], prune_schedule="geometric", prune_amount=0.2)[0],
    "linear": round_schedule(NUM_WEIGHTS, [0.95], prune_schedule="linear", prune_amount=0.05)[0],
}
# `make test-long` tries more of them.
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(5, 20))]


def make_bank(masks):
    return MaskBank.from_masks(
        [f"layer_{index}.weight" for index in range(len(masks[0]))], dict(zip(ROUTES, masks, strict=False))
    )


def naive_jaccard(first, second):
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else math.nan


def magnitude_masks(num_kept, seed, alike=0.9, scales=(1.0, 0.3, 0.6, 0.05)):
    """Global magnitude pruning of weights that share a part of their values, layers at different scales."""
    generator = torch.Generator().manual_seed(seed)
    shared = [torch.randn(shape, generator=generator) for shape in SHAPES]
    masks = []
    for _ in ROUTES:
        own = [torch.randn(shape, generator=generator) for shape in SHAPES]
        weights = [scale * (alike * s + (1 - alike) * o) for scale, s, o in zip(scales, shared, own, strict=True)]
        masks.append(prune(weights, [torch.ones(shape, dtype=torch.bool) for shape in SHAPES], num_kept=num_kept))
    return masks


# Chance


@pytest.mark.parametrize(("num_first", "num_second"), [(2, 3), (1, 1), (4, 5), (6, 2), (0, 3), (6, 6)])
def test_expected_jaccard_is_the_mean_over_all_masks(num_first, num_second):
    first = set(range(num_first))
    similarities = [len(first & set(c)) / len(first | set(c)) for c in combinations(range(6), num_second)]
    assert expected_jaccard(num_first, num_second, 6) == pytest.approx(np.mean(similarities), rel=1e-12)
    assert expected_jaccard(num_second, num_first, 6) == pytest.approx(np.mean(similarities), rel=1e-12)


def test_two_empty_masks_have_no_expected_jaccard():
    assert math.isnan(expected_jaccard(0, 0, 6))


@pytest.mark.parametrize(("kept", "num_weights"), [((300, 50), 1000), ((9000, 2), 10_000), ((250, 999), 1000)])
def test_expected_jaccard_of_many_weights_is_the_sum_over_the_distribution(kept, num_weights):
    x = np.arange(min(kept) + 1)
    probability = hypergeom(num_weights, *kept).pmf(x)
    expected = (probability * x / (sum(kept) - x)).sum()
    assert expected_jaccard(*kept, num_weights) == pytest.approx(expected, rel=1e-9)


def test_expected_jaccard_of_millions_of_weights_is_the_ratio_of_expectations():
    p = 0.1
    assert expected_jaccard(10**7, 10**7, 10**8) == pytest.approx(p / (2 - p), rel=1e-6)


def test_chance_of_layers_is_what_shuffled_layers_have():
    masks = magnitude_masks(num_kept=600, seed=0)
    assert emptied_layers(masks[0])  # which count for nothing
    counts = np.array([[int(layer.sum()) for layer in mask] for mask in masks]).T
    mean, variance = expected_jaccard_of_layers(counts, SIZES)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(600):
        one, two = (
            torch.cat([layer.flatten() for layer in shuffled_masks(mask, generator=generator)]) for mask in masks[:2]
        )
        drawn.append(naive_jaccard(one, two))
    assert mean[0, 1] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(600))
    assert math.sqrt(variance[0, 1]) == pytest.approx(np.std(drawn), rel=0.1)
    # Globally pruned tickets agree on the densities of layers, so uniform masks are no fair comparison.
    assert mean[0, 1] > expected_jaccard(600, 600, NUM_WEIGHTS) + 10 * np.std(drawn) / math.sqrt(600)


@pytest.mark.parametrize(("first", "second"), [(100, 200), (500, 500), (800, 150)])
def test_chance_of_one_layer_is_the_exact_one_to_second_order(first, second):
    mean, _ = expected_jaccard_of_layers([[first, second]], [1000])
    assert mean[0, 1] == mean[1, 0] == pytest.approx(expected_jaccard(first, second, 1000), abs=1e-5)
    without_correction = first * second / 1000 / (first + second - first * second / 1000)
    assert abs(without_correction - expected_jaccard(first, second, 1000)) > 2e-5


def test_chance_of_very_few_weights_by_hand():
    """One of two weights each: X is 0 or 1, μ = 1/2, σ² = 1/4, S = 2."""
    mean, variance = expected_jaccard_of_layers([[1, 1]], [2])
    assert mean[0, 1] == pytest.approx(0.5 / 1.5 + 0.25 * 2 / 1.5**3)
    assert variance[0, 1] == pytest.approx(0.25 * (2 / 1.5**2) ** 2)


def test_chance_of_full_and_of_empty_masks():
    mean, variance = expected_jaccard_of_layers([[5, 5, 0, 0]], [5])
    assert mean[0, 1] == 1 and variance[0, 1] == 0
    assert mean[0, 2] == 0 and np.isnan(mean[2, 3])


# Similarity


def test_similarity_to_the_others_is_that_of_naive_loops():
    masks = magnitude_masks(num_kept=700, seed=3)
    masks[1][3][:] = True  # a layer in which the other tickets keep nothing
    found, of_layers = ticket_similarity(make_bank(masks)), layer_similarity(make_bank(masks))
    flat = [torch.cat([layer.flatten() for layer in mask]).numpy() for mask in masks]
    counts = [[int(layer.sum()) for layer in mask] for mask in masks]
    pair_chance, _ = expected_jaccard_of_layers(np.array(counts).T, SIZES)
    for route in range(4):
        others = [other for other in range(4) if other != route]
        assert found.similarity[route] == pytest.approx(np.mean([naive_jaccard(flat[route], flat[o]) for o in others]))
        assert found.chance[route] == pytest.approx(np.mean([pair_chance[route, o] for o in others]))
        uniform = [expected_jaccard(sum(counts[route]), sum(counts[o]), NUM_WEIGHTS) for o in others]
        assert found.uniform_chance[route] == pytest.approx(np.mean(uniform))
        for layer in range(3):
            of_layer = [naive_jaccard(masks[route][layer], masks[o][layer]) for o in others]
            by_chance = [expected_jaccard(counts[route][layer], counts[o][layer], SIZES[layer]) for o in others]
            assert of_layers.similarity[layer, route] == pytest.approx(np.mean(of_layer))
            assert of_layers.chance[layer, route] == pytest.approx(np.mean(by_chance))
            assert of_layers.excess[layer, route] == pytest.approx(np.mean(of_layer) - np.mean(by_chance))
    assert found.excess == pytest.approx(found.similarity - found.chance)
    assert found.sparsity == pytest.approx(1 - np.mean([sum(c) for c in counts]) / NUM_WEIGHTS)
    assert found.jaccard == pytest.approx(make_bank(masks).similarity().numpy())


def test_a_layer_without_weights_has_no_similarity():
    masks = [[torch.ones(2, 3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)] for _ in range(3)]
    masks[2][1][:] = False
    found = ticket_similarity(make_bank(masks))
    assert found.emptied_layers == {"owl": ["layer_1.weight"]}
    of_layers = layer_similarity(make_bank(masks))
    assert of_layers.similarity[1].tolist()[:2] == [1, 1]  # of each other; the third has none
    assert np.isnan(of_layers.similarity[1, 2]) and np.isnan(of_layers.chance[1, 2])
    assert of_layers.layer_names == ["layer_0.weight", "layer_1.weight"] and of_layers.route_names == ROUTES[:3]
    assert found.similarity[0] == pytest.approx((1 + 6 / 10) / 2)


def test_a_single_ticket_is_like_no_other():
    found = ticket_similarity(make_bank([[torch.ones(4, dtype=torch.bool)]]))
    assert np.isnan(found.similarity).all() and np.isnan(found.excess).all() and found.emptied_layers == {}
    assert detect_collapse([found]) == {}


@pytest.mark.slow
def test_spread_is_that_of_random_masks():
    generator = torch.Generator().manual_seed(0)
    mask = [torch.arange(2000) < 400]
    points = [
        ticket_similarity(make_bank([random_masks(mask, generator=generator) for _ in ROUTES])) for _ in range(400)
    ]
    similarities = np.array([point.similarity for point in points])
    # Deviation and similarity are averaged over the tickets.
    assert points[0].deviation.mean() == pytest.approx(similarities.std(0).mean(), rel=0.1)
    assert similarities.mean() == pytest.approx(points[0].chance.mean(), abs=5e-4)


# Sharp changes


def trajectory(schedule, make):
    return [ticket_similarity(make_bank(make(num_kept))) for num_kept in SCHEDULES[schedule]]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("seed", SEEDS)
def test_random_and_shuffled_masks_raise_no_alarm(schedule, seed):
    scores = torch.rand(4, NUM_WEIGHTS, generator=torch.Generator().manual_seed(seed))

    def nested(num_kept):
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(num_kept).indices, True)
        return [[part.view(shape) for part, shape in zip(row.split(SIZES), SHAPES, strict=True)] for row in kept]

    def drawn_anew(num_kept):
        generator = torch.Generator().manual_seed(seed * 10_000 + num_kept)
        return [random_masks(mask, generator=generator) for mask in nested(num_kept)]

    def shuffled(num_kept):
        generator = torch.Generator().manual_seed(seed * 10_000 + num_kept)
        return [shuffled_masks(mask, generator=generator) for mask in magnitude_masks(num_kept, seed)]

    for make in (nested, drawn_anew, shuffled):
        points = trajectory(schedule, make)
        assert detect_collapse(points) == {}
        assert max(np.abs(point.excess).max() for point in points) < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks_of_very_few_weights_raise_no_alarm(seed):
    """With so few weights, chance alone moves similarity by more than 0.05."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.arange(60)
    points = [
        ticket_similarity(make_bank([random_masks([full < kept], generator=generator) for _ in ROUTES]))
        for kept in (48, 38, 31, 25, 20, 16, 13, 10, 8, 6)
    ]
    assert detect_collapse(points) == {}
    assert max(np.abs(point.excess).max() for point in points) > 0.05


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("alike", [0.3, 0.6, 0.9, 0.99])
def test_magnitude_pruning_without_a_collapse_raises_no_alarm(schedule, alike):
    assert detect_collapse(trajectory(schedule, lambda kept: magnitude_masks(kept, seed=5, alike=alike))) == {}


SMOOTH = {
    "flat": lambda s: 0.3 + 0 * s,
    "falling": lambda s: 0.6 - 0.5 * s,
    "density": lambda s: 0.8 * (1 - s) ** 0.25,
    "square": lambda s: 0.7 * s**2,
    "hill": lambda s: 0.4 * np.sin(np.pi * s),
    "logistic": lambda s: 0.6 / (1 + np.exp(-(s - 0.5) / 0.15)),
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("trend", list(SMOOTH))
@pytest.mark.parametrize("seed", range(5))
def test_smooth_trends_raise_no_alarm_with_some_noise(schedule, trend, seed):
    sparsity = 1 - np.array(SCHEDULES[schedule]) / NUM_WEIGHTS
    noise = 0.005 * np.random.default_rng(seed).standard_normal(len(sparsity))
    assert detect_change(sparsity, SMOOTH[trend](sparsity) + noise, 0 * sparsity) is None


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_planted_collapse_is_found_in_the_masks(schedule, direction, seed):
    """From 70 % on, tickets become equal, or keep weights that no other ticket has."""

    def make(num_kept):
        masks = magnitude_masks(num_kept, seed, alike=0.8, scales=(1.0, 1.0, 1.0, 1.0))
        if 1 - num_kept / NUM_WEIGHTS < 0.7:
            return masks
        if direction == "up":
            return [masks[0]] * 4
        order = torch.randperm(NUM_WEIGHTS, generator=torch.Generator().manual_seed(seed))
        disjoint = torch.zeros(4, NUM_WEIGHTS, dtype=torch.bool)
        for route in range(4):
            start = route * (NUM_WEIGHTS - num_kept) // 3
            disjoint[route, order[start : start + num_kept]] = True
        return [[part.view(shape) for part, shape in zip(row.split(SIZES), SHAPES, strict=True)] for row in disjoint]

    points = trajectory(schedule, make)
    changes = detect_collapse(points)
    first = next(index for index, point in enumerate(points) if point.sparsity >= 0.7)
    assert list(changes) == ROUTES
    for route, change in enumerate(changes.values()):
        assert (change.point, change.direction) == (first, direction)
        assert change.sparsity == points[first].sparsity and change.found == points[first].excess[route]
        assert change.before == points[first - 1].excess[route]
        assert abs(change.expected - change.before) < 0.1 < abs(change.found - change.expected)


def test_only_the_route_that_changes_is_named():
    """One of two groups of tickets collapses; the others' mean similarity moves less."""
    sparsity = np.linspace(0.1, 0.9, 9)
    still, moved = 0.3 - 0.1 * sparsity, 0.3 - 0.1 * sparsity
    moved[6:] += 0.2
    assert detect_change(sparsity, still, 0 * sparsity) is None
    change = detect_change(sparsity, moved, 0 * sparsity)
    assert change.point == 6 and change.expected == pytest.approx(0.23) and change.found == pytest.approx(0.43)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_collapse_that_takes_two_events_is_found_at_the_second(sign):
    sparsity = np.linspace(0.1, 0.9, 9)
    excess = 0.5 + sign * np.array([0, 0, 0, 0, 0, 0, 0.04, 0.08, 0.08])
    change = detect_change(sparsity, excess, 0 * sparsity)
    assert (change.point, change.direction) == (7, "up" if sign == 1 else "down")
    assert change.before == 0.5 and change.expected == pytest.approx(0.5)


@pytest.mark.parametrize(("size", "found"), [(0.045, False), (0.055, True)])
def test_the_least_sharp_move(size, found):
    sparsity = np.linspace(0.1, 0.9, 9)
    assert (detect_change(sparsity, 0.4 - size * (sparsity > 0.65), 0 * sparsity) is not None) == found


@pytest.mark.parametrize("sign", [1, -1])
def test_a_steep_trend_that_levels_off_is_no_collapse(sign):
    sparsity = np.linspace(0.1, 0.9, 9)
    assert detect_change(sparsity, 0.5 + sign * np.minimum(sparsity, 0.5), 0 * sparsity) is None


@pytest.mark.parametrize(("last", "found"), [(0.6, False), (0.95, True)])
def test_a_value_between_the_trends_in_sparsity_and_in_density_is_no_change(last, found):
    """At the last point, a line in sparsity predicts 0.45, and a line in the logarithm of density 0.82."""
    sparsity = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    change = detect_change(sparsity, [0.05, 0.1, 0.15, 0.2, last], 0 * sparsity)
    assert (change is not None) == found


@pytest.mark.parametrize(("size", "found"), [(0.055, False), (0.2, True)])
def test_a_trend_that_scatters_must_be_left_by_more(size, found):
    sparsity = np.linspace(0.05, 0.95, 19)
    excess = 0.3 + 0.05 * (-1.0) ** np.arange(19)
    excess[12:] += size
    assert (detect_change(sparsity, excess, 0 * sparsity) is not None) == found


@pytest.mark.parametrize(("deviation", "found"), [(0.01, True), (0.05, False)])
def test_a_move_within_chance_is_none(deviation, found):
    sparsity = np.linspace(0.1, 0.9, 9)
    excess = 0.2 * (sparsity > 0.65)
    assert (detect_change(sparsity, excess, np.full(9, deviation)) is not None) == found


@pytest.mark.parametrize(("num_points", "found"), [(1, False), (4, False), (5, True)])
def test_few_points_say_nothing(num_points, found):
    sparsity = np.linspace(0.5, 0.9, num_points)
    excess = np.array([0.1] * (num_points - 1) + [0.9])
    assert (detect_change(sparsity, excess, 0 * sparsity) is not None) == found


def test_a_run_that_starts_dense_is_judged():
    sparsity = np.array([0, 0.2, 0.4, 0.6, 0.8])
    assert detect_change(sparsity, [0, 0.1, 0.2, 0.3, 0.9], 0 * sparsity).point == 4


def test_bad_trajectories_are_refused():
    with pytest.raises(ValueError, match="`sparsity`, `excess` and `deviation` have 2, 1 and 2 values"):
        detect_change([0.1, 0.2], [0.1], [0, 0])
    for sparsity in ([0.2, 0.2], [0.3, 0.2], [-0.1, 0.2], [0.5, 1.0]):
        with pytest.raises(ValueError, match="must increase strictly within"):
            detect_change(sparsity, [0, 0], [0, 0])
    points = trajectory("geometric", lambda kept: magnitude_masks(kept, seed=0))[:2]
    other = MaskBank([("weight", (4,))], ["a", "b"])
    with pytest.raises(ValueError, match="`points` are of different routes"):
        detect_collapse([points[0], ticket_similarity(other)])
    assert detect_collapse([]) == {}


# Semantic alignment


def symmetric(num_routes, seed, ties=False):
    values = np.random.default_rng(seed).random((num_routes, num_routes))
    values = np.round(values * 4) if ties else values
    return values + values.T


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_that_of_scipy(ties):
    one, two = (symmetric(9, seed, ties)[np.triu_indices(9, k=1)] for seed in (0, 1))
    assert spearman(one, two) == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)


def naive_rho(similarity, classes):
    pairs = [(i, j) for i, j in combinations(range(len(classes)), 2) if not math.isnan(similarity[i, j])]
    return spearmanr([similarity[i, j] for i, j in pairs], [classes[i, j] for i, j in pairs]).statistic


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("num_routes", [4, 5])
def test_the_test_of_few_routes_takes_all_permutations(num_routes, lacking):
    similarity, classes = symmetric(num_routes, 2), symmetric(num_routes, 3, ties=True)
    if lacking:
        similarity[0, 2] = similarity[2, 0] = np.nan
    found = semantic_alignment(similarity, classes)
    observed = naive_rho(similarity, classes)
    rhos = [naive_rho(similarity, classes[np.ix_(p, p)]) for p in permutations(range(num_routes))]
    assert found.rho == pytest.approx(observed) and found.exact
    assert found.num_permutations == math.factorial(num_routes)
    assert found.p_value == pytest.approx(np.mean([rho >= observed - 1e-9 for rho in rhos]))


@pytest.mark.slow
def test_the_test_of_many_routes_draws_permutations():
    similarity, classes = symmetric(9, 4), symmetric(9, 5)
    found = semantic_alignment(similarity, classes, num_permutations=1500, seed=7)
    observed, generator = naive_rho(similarity, classes), np.random.default_rng(8)
    drawn = (generator.permutation(9) for _ in range(1500))
    at_least = sum(naive_rho(similarity, classes[np.ix_(p, p)]) >= observed for p in drawn)
    assert not found.exact and found.num_permutations == 1500 and found.rho == pytest.approx(observed)
    assert found.p_value == pytest.approx((1 + at_least) / 1501, abs=0.06)
    assert (found.p_value * 1501) == pytest.approx(round(found.p_value * 1501))
    assert found == semantic_alignment(similarity, classes, num_permutations=1500, seed=7)
    assert found.p_value != semantic_alignment(similarity, classes, num_permutations=1500, seed=8).p_value


def test_alignment_that_is_there_is_found_and_its_reverse_is_not():
    classes = symmetric(10, 6)
    found = semantic_alignment(classes**3, classes)
    assert found.rho == pytest.approx(1) and found.p_value == pytest.approx(1e-4)
    reverse = semantic_alignment(-classes, classes)
    assert reverse.rho == pytest.approx(-1) and reverse.p_value == 1


def test_p_values_of_unrelated_similarities_are_even():
    p_values = [
        semantic_alignment(symmetric(8, seed), symmetric(8, 1000 + seed), num_permutations=199).p_value
        for seed in range(200)
    ]
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08) and np.mean(np.array(p_values) <= 0.05) < 0.1


@pytest.mark.parametrize("similarity", [np.ones((5, 5)), np.full((5, 5), np.nan)])
def test_alignment_of_what_does_not_differ_is_undefined(similarity):
    found = semantic_alignment(similarity, symmetric(5, 0))
    assert math.isnan(found.rho) and math.isnan(found.p_value)


def test_matrices_of_other_routes_are_refused():
    with pytest.raises(ValueError, match=r"`similarity` has shape \[3, 3\] and `class_similarity` \[4, 4\]"):
        semantic_alignment(symmetric(3, 0), symmetric(4, 0))


def test_depth_is_cut_into_thirds():
    assert depth_thirds(7) == {"shallow": [0, 1, 2], "middle": [3, 4], "deep": [5, 6]}
    assert depth_thirds(3) == {"shallow": [0], "middle": [1], "deep": [2]}
    assert depth_thirds(2) == {"shallow": [0], "middle": [1]}


def test_similarity_by_depth_is_over_the_weights_of_the_layers():
    masks = magnitude_masks(num_kept=1500, seed=4)
    found = similarity_by_depth(make_bank(masks))
    for name, layers in {"all": [0, 1, 2, 3], "shallow": [0, 1], "middle": [2], "deep": [3]}.items():
        flat = [torch.cat([mask[layer].flatten() for layer in layers]).numpy() for mask in masks]
        expected = [[naive_jaccard(one, two) for one in flat] for two in flat]
        assert found[name] == pytest.approx(np.array(expected), nan_ok=True)
    assert np.isnan(found["deep"]).all()  # emptied
