"""
Analysis of masks alone: how similar tickets are beyond chance, when this changes sharply as they grow sparser, and
whether it follows the similarity of their classes (paper, section 4.4). Knows mask banks, but no models or training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray

from .modeling.mask_bank import MaskBank, expected_similarity


Array = NDArray[np.float64]

# Constants of `detect_change`, whose docstring gives the reasons.
WINDOW = 3  # points of a trend
LAGS = (1, 2)  # numbers of points that a move may span
LEAST_POINTS = WINDOW + 2  # a trend, one point that is compared with it, and the point that is judged
LEAST_MOVE = 0.05  # of the excess similarity
LEAST_SURPRISE = 3.0  # as a multiple of the median earlier surprise
LEAST_DEVIATIONS = 6.0  # as a multiple of the standard deviation that random masks would have

# Number of permutations that are ranked at once. With a hundred routes they take tens of megabytes.
_BLOCK = 512


# Similarity and chance


@lru_cache(maxsize=2**16)
def expected_jaccard(num_first: int, num_second: int, num_weights: int) -> float:
    """
    The expected Jaccard similarity of two independent, uniformly random masks that keep `num_first` and `num_second`
    of `num_weights` weights.

    The number X of weights that both keep is hypergeometric, P(X = x) = C(a, x) C(n - a, b - x) / C(n, b), and the
    similarity is x / (a + b - x). The expectation is the sum of P(X = x) · x / (a + b - x). It is exact to rounding:
    only values x that are less probable than 1e-30 are left out. NaN if both masks keep nothing.
    """
    if num_first + num_second == 0:
        return math.nan
    mean = num_first * num_second / num_weights
    # Bernstein's inequality with the binomial's variance, which is no less than the hypergeometric's.
    reach = 12 * math.sqrt(mean * (1 - num_second / num_weights)) + 50
    low = max(0, num_first + num_second - num_weights, math.floor(mean - reach))
    high = min(num_first, num_second, math.ceil(mean + reach))
    both = np.arange(low, high + 1, dtype=np.float64)
    outside = num_weights - num_first - num_second + both
    counts = np.stack([both, num_first - both, num_second - both, outside])
    logarithm = -torch.lgamma(torch.from_numpy(counts + 1)).numpy().sum(0)
    probability = np.exp(logarithm - logarithm.max())
    return float(probability @ (both / (num_first + num_second - both)) / probability.sum())


def expected_jaccard_of_layers(kept: Array, sizes: Array) -> tuple[Array, Array]:
    """
    Mean and variance of the Jaccard similarity of independent random masks that keep as many weights in each layer as
    the given ones: the chance level for tickets of global magnitude pruning. The formula is in the docstring of
    `modeling.mask_bank.expected_similarity`.

    Args:
        kept (`[L, K]`): weights that each of K masks keeps in each of L layers.
        sizes (`[L]`): weights of each layer.

    Returns:
        Two arrays `float64 [K, K]`; NaN where both masks keep nothing. The diagonal, too, is for independent masks.
    """
    mean, variance = expected_similarity(torch.as_tensor(np.asarray(kept)), torch.as_tensor(np.asarray(sizes)))
    return mean.numpy(), variance.numpy()


@dataclass(frozen=True)
class TicketSimilarity:
    """
    The similarity of a bank's tickets over all weights; see [`ticket_similarity`]. Arrays are `float64`, for K routes.
    Means over the other tickets are NaN if there is no other ticket.

    Args:
        route_names (`list[str]`): in the bank's order.
        sparsity (`float`): mean over the tickets.
        jaccard (`[K, K]`): similarity of every pair.
        similarity (`[K]`): its mean over the other tickets (paper, section 4.4).
        chance (`[K]`): the mean expected of random masks with the same densities in every layer.
        uniform_chance (`[K]`): the mean expected of random masks with the same density over all layers together.
        excess (`[K]`): `similarity - chance`.
        deviation (`[K]`): the standard deviation of `similarity` for random masks as in `chance`.
        emptied_layers (`dict[str, list[str]]`): route name -> layers in which its ticket keeps nothing, if any.
    """

    route_names: list[str]
    sparsity: float
    jaccard: Array
    similarity: Array
    chance: Array
    uniform_chance: Array
    excess: Array
    deviation: Array
    emptied_layers: dict[str, list[str]]


@dataclass(frozen=True)
class LayerSimilarity:
    """
    The similarity of a bank's tickets in each of L layers (prunable weights); see [`layer_similarity`].

    Args:
        layer_names (`list[str]`), route_names (`list[str]`): in the bank's order.
        similarity, chance, excess (`float64 [L, K]`): those of [`TicketSimilarity`], in each layer.
    """

    layer_names: list[str]
    route_names: list[str]
    similarity: Array
    chance: Array
    excess: Array


def ticket_similarity(bank: MaskBank) -> TicketSimilarity:
    """Each ticket's similarity to the others over all weights, its part by chance, and the layers that are empty."""
    sizes = np.array([shape.numel() for shape in bank.shapes])
    counts = bank.count(per_layer=True).cpu().numpy()
    totals = counts.sum(0)
    jaccard = bank.similarity().cpu().numpy()
    similarity = _mean_over_others(jaccard)
    pair_chance, variance = expected_jaccard_of_layers(counts, sizes)
    chance = _mean_over_others(pair_chance)
    emptied = {
        name: [bank.weight_names[layer] for layer in np.flatnonzero(counts[:, route] == 0)]
        for route, name in enumerate(bank.route_names)
    }
    return TicketSimilarity(
        route_names=list(bank.route_names),
        sparsity=1 - float(totals.mean()) / bank.num_weights,
        jaccard=jaccard,
        similarity=similarity,
        chance=chance,
        uniform_chance=_mean_over_others(_expected_pairs(totals, bank.num_weights)),
        excess=similarity - chance,
        # Given one mask, its intersections with independent others are independent.
        deviation=np.sqrt(_mean_over_others(variance) / max(bank.num_routes - 1, 1)),
        emptied_layers={name: layers for name, layers in emptied.items() if layers},
    )


def layer_similarity(bank: MaskBank) -> LayerSimilarity:
    """
    Each ticket's similarity to the others in each layer, and its part by chance.

    Where a ticket keeps nothing in a layer, it has no similarity to any other ticket there. The means leave such pairs
    out, and are NaN if no pair is left. ([`ticket_similarity`] leaves no layer out.)
    """
    counts = bank.count(per_layer=True).cpu().numpy()
    empty = counts == 0
    no_value = empty[:, :, None] | empty[:, None, :]
    jaccard = np.where(no_value, np.nan, bank.similarity(per_layer=True).cpu().numpy())
    expected = [_expected_pairs(kept, shape.numel()) for kept, shape in zip(counts, bank.shapes, strict=True)]
    similarity = _mean_over_others(jaccard)
    chance = _mean_over_others(np.where(no_value, np.nan, np.stack(expected)))
    return LayerSimilarity(
        layer_names=list(bank.weight_names),
        route_names=list(bank.route_names),
        similarity=similarity,
        chance=chance,
        excess=similarity - chance,
    )


def _expected_pairs(kept: NDArray[np.int64], num_weights: int) -> Array:
    """`expected_jaccard` of all pairs of K masks: `[K, K]`."""
    values = np.empty((len(kept), len(kept)))
    for first, second in zip(*np.triu_indices(len(kept)), strict=True):
        pair = sorted((int(kept[first]), int(kept[second])))
        values[first, second] = values[second, first] = expected_jaccard(*pair, num_weights)
    return values


def _mean_over_others(matrices: Array) -> Array:
    """`[..., K, K]` -> `[..., K]`: the mean of each row without its diagonal and without NaN."""
    known = ~np.isnan(matrices) & ~np.eye(matrices.shape[-1], dtype=bool)
    with np.errstate(invalid="ignore"):
        return np.where(known, matrices, 0).sum(-1) / known.sum(-1)


# Collapse


@dataclass(frozen=True)
class Change:
    """
    A sharp move of a ticket's similarity to the others.

    Args:
        point (`int`): index of the point at which it is seen.
        sparsity (`float`): at that point.
        direction (`str`): `"up"` or `"down"`.
        before (`float`): excess similarity at the last point before the move.
        expected (`float`): value of the earlier trend at `point`.
        found (`float`): excess similarity at `point`.
    """

    point: int
    sparsity: float
    direction: str
    before: float
    expected: float
    found: float


def detect_change(sparsity: Sequence[float], excess: Sequence[float], deviation: Sequence[float]) -> Change | None:
    """
    The first sharp move, up or down, of one ticket's excess similarity against its earlier trend. `None` if there is
    none, or if there are fewer than five points. It uses neither labels nor accuracy.

    A trend is the least-squares line through `WINDOW` = 3 successive points, the fewest that a line averages. It is
    extrapolated by one or two points (`LAGS`), since a collapse may take two events. The surprise is the value minus
    the extrapolation. A smooth trend bends, and it is unknown in which unit it bends less: geometric schedules take
    even steps in the logarithm of density, linear ones in sparsity. So both lines are fitted, and the smaller surprise
    counts; it is zero if their signs differ. A move is sharp if all of these hold:

    - The value has moved in the direction of the surprise. A steep trend that levels off is a surprise, no collapse.
    - Move and surprise exceed `LEAST_MOVE` = 0.05. In the paper's deep layers, tickets of similar classes differ from
      those of dissimilar ones by about as much (.33-.36 against .27-.31), so the meaning of classes explains less.
    - The surprise exceeds `LEAST_SURPRISE` = 3 times the median of all earlier ones over the same lag, which are large
      if the trend bends or the points scatter. An earlier one is needed, so the fifth point is the first that can be
      judged: the rounds of a run to 25, 50 and 75 % are too few, its prune events may be enough.
    - The surprise exceeds `LEAST_DEVIATIONS` = 6 times its standard deviation under random masks, from `deviation`. In
      very small networks 0.05 is within chance; 6 standard deviations have a probability below 10^-8 at every point.

    The constants come only from the paper and from smooth curves (overlaps of the largest of correlated normal
    variables, powers of density and of sparsity, logistic curves). They were fixed before any run.

    Args:
        sparsity (`Sequence[float]`): strictly increasing, in [0, 1).
        excess (`Sequence[float]`): the ticket's `TicketSimilarity.excess` at each of them.
        deviation (`Sequence[float]`): the ticket's `TicketSimilarity.deviation` at each of them.

    Raises:
        ValueError: sequences of different lengths, or `sparsity` that does not increase or is out of range.
    """
    clock, values, deviations = (np.asarray(given, dtype=np.float64) for given in (sparsity, excess, deviation))
    if not len(clock) == len(values) == len(deviations):
        raise ValueError(
            f"`sparsity`, `excess` and `deviation` have {len(clock)}, {len(values)} and {len(deviations)} values; one "
            "of each per point is needed."
        )
    if np.any(np.diff(clock) <= 0) or np.any(clock < 0) or np.any(clock >= 1):
        raise ValueError(f"`sparsity` is {clock.tolist()}; it must increase strictly within [0, 1).")
    earlier: dict[int, list[float]] = {lag: [] for lag in LAGS}
    for point in range(len(values)):
        for lag in LAGS:
            last = point - lag
            if last + 1 < WINDOW:
                continue
            trend = slice(last + 1 - WINDOW, last + 1)
            weights = [_trend_weights(unit[trend], unit[point]) for unit in (clock, -np.log1p(-clock))]
            surprises = [float(values[point] - w @ values[trend]) for w in weights]
            nearest = int(np.argmin(np.abs(surprises)))
            surprise = surprises[nearest] if surprises[0] * surprises[1] > 0 else 0.0
            move = float(values[point] - values[last])
            noise = math.sqrt(deviations[point] ** 2 + weights[nearest] ** 2 @ deviations[trend] ** 2)
            if (
                earlier[lag]
                and move * surprise > 0
                and min(abs(move), abs(surprise)) > LEAST_MOVE
                and abs(surprise) > LEAST_SURPRISE * float(np.median(earlier[lag]))
                and abs(surprise) > LEAST_DEVIATIONS * noise
            ):
                return Change(
                    point=point,
                    sparsity=float(clock[point]),
                    direction="up" if move > 0 else "down",
                    before=float(values[last]),
                    expected=float(values[point]) - surprise,
                    found=float(values[point]),
                )
            earlier[lag].append(abs(surprise))
    return None


def _trend_weights(at: Array, target: float) -> Array:
    """Weights of the values at `at`: the weighted sum is the value of their least-squares line at `target`."""
    centred = at - at.mean()
    return 1 / len(at) + centred * (target - at.mean()) / (centred @ centred)


def detect_collapse(points: Sequence[TicketSimilarity]) -> dict[str, Change]:
    """
    The routes whose similarity to the others changes sharply over successive rounds or prune events, each with its
    first [`Change`]; see [`detect_change`].

    Args:
        points (`Sequence[TicketSimilarity]`): of the same routes, at increasing sparsity.

    Raises:
        ValueError: points of other routes, or sparsity that does not increase.
    """
    if not points:
        return {}
    names = points[0].route_names
    for point in points:
        if point.route_names != names:
            raise ValueError(f"`points` are of different routes: {names} and {point.route_names}.")
    changes = {}
    for route, name in enumerate(names):
        change = detect_change(
            [point.sparsity for point in points],
            [point.excess[route] for point in points],
            [point.deviation[route] for point in points],
        )
        if change is not None:
            changes[name] = change
    return changes


# Semantic alignment


@dataclass(frozen=True)
class Alignment:
    """
    How far the similarity of tickets follows that of their classes.

    Args:
        rho (`float`): Spearman's rank correlation over the pairs of routes; NaN if it is undefined.
        p_value (`float`): one-sided, of the Mantel test; NaN if `rho` is.
        num_permutations (`int`): how many were compared with; all that exist if `exact`.
        exact (`bool`): whether all permutations were enumerated.
    """

    rho: float
    p_value: float
    num_permutations: int
    exact: bool


def spearman(first: Array, second: Array) -> Array:
    """Spearman's rank correlation along the last axis, ties at their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata  # here, since it would add a third of a second to `import hf_rtl`

    ranks = [rankdata(values, axis=-1) for values in np.broadcast_arrays(first, second)]
    one, two = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (one * two).sum(-1) / np.sqrt((one**2).sum(-1) * (two**2).sum(-1))


def semantic_alignment(
    similarity: Array, class_similarity: Array, *, num_permutations: int = 9999, seed: int = 0
) -> Alignment:
    """
    Spearman's correlation between the upper triangles of two similarity matrices, with a Mantel test.

    Pairs are not independent, so the test permutes routes: rows and columns of `class_similarity` together. The
    p-value is (1 + c) / (1 + `num_permutations`), where c permutations correlate at least as much. If there are no
    more than `num_permutations` permutations in all (up to 7 routes by default), all are taken once, the identity
    among them, and p is the exact fraction.

    Args:
        similarity (`[K, K]`): of masks; pairs that are NaN are left out.
        class_similarity (`[K, K]`): of the classes, in the same order.
        num_permutations (`int`, defaults to 9999): see above.
        seed (`int`, defaults to 0): of the permutations.

    Raises:
        ValueError: matrices that are not square and of the same size.
    """
    similarity, class_similarity = (np.asarray(m, dtype=np.float64) for m in (similarity, class_similarity))
    num_routes = len(similarity)
    if not similarity.shape == class_similarity.shape == (num_routes, num_routes):
        raise ValueError(
            f"`similarity` has shape {list(similarity.shape)} and `class_similarity` {list(class_similarity.shape)}; "
            "both must be [K, K], with the routes in the same order."
        )
    first, second = np.triu_indices(num_routes, k=1)
    known = ~np.isnan(similarity[first, second])
    first, second = first[known], second[known]
    pairs = similarity[first, second]
    exact = math.factorial(num_routes) <= num_permutations
    if exact:
        orders = np.array(list(permutations(range(num_routes))))
    else:
        orders = np.tile(np.arange(num_routes), (num_permutations, 1))
        orders = np.random.default_rng(seed).permuted(orders, axis=1)
    rho = float(spearman(pairs, class_similarity[first, second])) if len(pairs) > 1 else math.nan
    if math.isnan(rho):
        return Alignment(math.nan, math.nan, len(orders), exact)
    count = 0
    for start in range(0, len(orders), _BLOCK):
        block = orders[start : start + _BLOCK]
        permuted = spearman(pairs, class_similarity[block[:, first], block[:, second]])
        # Equal correlations may differ in rounding.
        count += int((permuted >= rho - 1e-12).sum())
    p_value = count / len(orders) if exact else (1 + count) / (1 + len(orders))
    return Alignment(rho, p_value, len(orders), exact)


def depth_thirds(num_layers: int) -> dict[str, list[int]]:
    """Indices of the layers in the `"shallow"`, `"middle"` and `"deep"` third, without empty thirds. Earlier thirds
    have one layer more if the number is no multiple of 3."""
    parts = np.array_split(np.arange(num_layers), 3)
    return {name: part.tolist() for name, part in zip(("shallow", "middle", "deep"), parts, strict=True) if len(part)}


def similarity_by_depth(bank: MaskBank) -> dict[str, Array]:
    """
    Jaccard similarity `[K, K]` over the weights of all layers (`"all"`), and over each third of the layers by depth.
    The depth follows the bank's order, which is that of the network's modules. NaN where both masks are empty.
    """
    intersections = bank.intersection_count(per_layer=True).cpu().numpy()
    counts = bank.count(per_layer=True).cpu().numpy()
    similarities = {}
    for name, layers in {"all": list(range(len(counts))), **depth_thirds(len(counts))}.items():
        both, kept = intersections[layers].sum(0), counts[layers].sum(0)
        with np.errstate(invalid="ignore"):
            similarities[name] = both / (kept[:, None] + kept[None, :] - both)
    return similarities
