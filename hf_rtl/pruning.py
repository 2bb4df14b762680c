"""
Magnitude pruning as pure functions on lists of tensors: what is kept, how much per event, and control masks.

Everywhere, `weights` is a list of floating point tensors, one per layer, and `masks` a list of `bool` tensors of the
same shapes, `True` = kept. The position of a weight is its layer, then its index in the flattened (row-major) layer.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .modeling.checks import check_choice, check_integer, check_number


PRUNE_SCOPES = ("global", "layer", "global_normalised", "row")
UNIT_SCOPES = ("layer", "global")
PRUNE_SCHEDULES = ("geometric", "linear", "constant")


@torch.no_grad()
def prune(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    num_kept: int,
    scope: str = "global",
    reference: Sequence[Tensor] | None = None,
    scores: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """
    Keeps exactly `num_kept` of the surviving weights, those of largest magnitude (paper, section 2, Algorithm 1), or
    those of largest score.

    Among equal magnitudes the earlier position is kept. The arguments are not changed.

    Args:
        weights (`Sequence[Tensor]`): the weights after training; those outside `masks` are not read.
        masks (`Sequence[Tensor]`): the survivors so far.
        num_kept (`int`): how many weights are kept over all layers, from 0 to the number of survivors.
        scope (`str`, defaults to `"global"`): what the magnitudes are ranked against.
            `"global"`: all survivors together (the paper's).
            `"layer"`: the survivors of the same layer. A layer keeps its share of `num_kept` in proportion to its full
            size, in whole numbers by largest remainder (the earlier layer on equal remainders); a layer that has fewer
            survivors than its share keeps them all, and the others share the rest in the same way.
            `"global_normalised"`: all survivors together, each magnitude divided by the (population) standard
            deviation of its layer in `reference`, in `float64`.
            `"row"`: the survivors of the same row, an index of the first dimension. Layers have their shares as in
            `"layer"`, and rows have theirs of a layer's share in the same way.
        reference (`Sequence[Tensor]`, *optional*): the initial weights θ0, of the shapes of `weights`, read only by
            `"global_normalised"`, which needs them.
        scores (`Sequence[Tensor]`, *optional*): floats of the shapes of `weights` that are ranked in place of
            magnitudes, such as those of `weight_activity`.

    Returns:
        `list[Tensor]`: new `bool` masks, nested in `masks`.

    Raises:
        TypeError: `weights` are not floating point, `masks` not `bool`, `num_kept` not an integer.
        ValueError: lists, shapes or devices that do not match, `num_kept` out of range, an unknown `scope`, a survivor
            that is NaN, a missing `reference` or one with a layer whose standard deviation is zero or not finite.
    """
    _check_masks(masks)
    _check_weights("weights", weights, masks)
    num_survivors = sum(int(mask.sum()) for mask in masks)
    num_kept = check_integer("num_kept", num_kept)
    if not 0 <= num_kept <= num_survivors:
        raise ValueError(
            f"`num_kept` is {num_kept}; allowed is 0 to {num_survivors}, the number of surviving weights."
        )
    check_choice("scope", scope, PRUNE_SCOPES)

    ranked = "weights" if scores is None else "scores"
    if scores is not None:
        _check_weights("scores", scores, masks)
    magnitudes = []
    for layer, (weight, mask) in enumerate(zip(scores or weights, masks, strict=True)):
        survivors = weight[mask].abs()
        if survivors.isnan().any():
            raise ValueError(f"`{ranked}[{layer}]` has NaN among its surviving weights, so they cannot be ranked.")
        # Half types are ranked in float32: exact, and supported on every device.
        magnitudes.append(survivors.to(torch.promote_types(survivors.dtype, torch.float32)))

    if scope in ("layer", "row"):
        limits = [layer_magnitudes.numel() for layer_magnitudes in magnitudes]
        counts = _proportional_counts(num_kept, [mask.numel() for mask in masks], limits)
        if scope == "row":
            kept = [_largest_of_rows(*layer) for layer in zip(magnitudes, masks, counts, strict=True)]
        else:
            kept = [_largest(values, count) for values, count in zip(magnitudes, counts, strict=True)]
    else:
        if scope == "global_normalised":
            if reference is None:
                raise ValueError("`reference` is None; scope 'global_normalised' needs the initial weights there.")
            _check_weights("reference", reference, masks)
            scales = [_standard_deviation(layer, initial) for layer, initial in enumerate(reference)]
            magnitudes = [values.double() / scale for values, scale in zip(magnitudes, scales, strict=True)]
        kept = list(_largest(torch.cat(magnitudes), num_kept).split([values.numel() for values in magnitudes]))

    return [
        torch.zeros_like(mask).masked_scatter_(mask, layer_kept) for mask, layer_kept in zip(masks, kept, strict=True)
    ]


def _largest(magnitudes: Tensor, num_kept: int) -> Tensor:
    """Booleans `[n]` that are true for the `num_kept` largest of `magnitudes [n]`, the first ones among equals."""
    if num_kept == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    # Only the threshold's value is used: it is unspecified which of several equal elements a selection returns.
    num_removed = magnitudes.numel() - num_kept
    if magnitudes.device.type == "cpu":
        threshold = magnitudes.kthvalue(num_removed + 1).values
    else:  # on other devices kthvalue may raise under deterministic algorithms, and sorting is cheap
        threshold = magnitudes.sort().values[num_removed]
    kept = magnitudes > threshold
    tied = (magnitudes == threshold).nonzero().squeeze(1)
    kept[tied[: num_kept - int(kept.sum())]] = True
    return kept


def _largest_of_rows(magnitudes: Tensor, mask: Tensor, num_kept: int) -> Tensor:
    """The same among the survivors of each row of `mask`, whose shares of `num_kept` are in proportion."""
    rows = mask.flatten(1)
    counts = _proportional_counts(num_kept, [rows.shape[1]] * len(rows), rows.sum(1).tolist())
    values = torch.full(rows.shape, -math.inf, dtype=magnitudes.dtype, device=mask.device)
    order = values.masked_scatter_(rows, magnitudes).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(rows.shape[1], device=mask.device) < torch.tensor(counts, device=mask.device)[:, None]
    return torch.zeros_like(rows).scatter_(1, order, first)[rows]


@torch.no_grad()
def prune_units(
    scores: Sequence[Tensor],
    kept: Sequence[Tensor],
    *,
    sparsity: float,
    scope: str = "layer",
    round_to: int = 8,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """
    Keeps the surviving units of largest score: whole neurons or channels, in place of single weights.

    Args:
        scores (`Sequence[Tensor]`): a score for every unit, `[num_units]` per layer.
        kept (`Sequence[Tensor]`): the survivors so far, `bool [num_units]` per layer.
        sparsity (`float`): the share of all units that is removed, those removed before included.
        scope (`str`, defaults to `"layer"`): what scores are ranked against.
            `"layer"`: the units of the same layer, so that layers of one size keep as many units.
            `"global"`: all units together.
        round_to (`int`, defaults to 8): with scope `"layer"` a layer keeps a multiple of this number, the nearest one,
            the larger of two as near, at least one multiple, and at most all of its units.
        names (`Sequence[str]`, *optional*): names of the layers, for errors.

    Returns:
        `list[Tensor]`: the units that are kept, `bool`, nested in `kept`; the first ones among equals.

    Raises:
        ValueError: a sparsity outside `[0, 1)`, scores that are not finite, an unknown `scope`, a layer that would
            keep no unit, or one with fewer survivors than it should keep.
    """
    check_choice("scope", scope, UNIT_SCOPES)
    round_to = check_integer("round_to", round_to, minimum=1)
    sparsity = check_sparsity(sparsity)
    layers = names or [f"layer {layer}" for layer in range(len(kept))]
    for name, values, survivors in zip(layers, scores, kept, strict=True):
        if not values[survivors].isfinite().all():
            raise ValueError(f"the scores of {name} are not all finite, so its units cannot be ranked.")
    sizes = [len(survivors) for survivors in kept]
    if scope == "layer":
        counts = [_rounded(size - sparsity * size, round_to, size) for size in sizes]
        for name, count, survivors in zip(layers, counts, kept, strict=True):
            if count > survivors.sum():
                raise ValueError(
                    f"`sparsity` = {sparsity} keeps {count} units of {name}, which has only "
                    f"{int(survivors.sum())} left; give a larger sparsity than the one before."
                )
        chosen = [
            _largest(values[survivors], count) for values, survivors, count in zip(scores, kept, counts, strict=True)
        ]
    else:
        count = sum(sizes) - round(sparsity * sum(sizes))
        every = torch.cat([values[layer] for values, layer in zip(scores, kept, strict=True)])
        chosen = list(_largest(every, count).split([int(layer.sum()) for layer in kept]))
    found = [torch.zeros_like(layer).masked_scatter_(layer, one) for layer, one in zip(kept, chosen, strict=True)]
    for name, units in zip(layers, found, strict=True):
        if not units.any():
            raise ValueError(
                f"`sparsity` = {sparsity} would remove all units of {name}. Lower it, or use `scope='layer'`."
            )
    return found


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a `float`. Raises `ValueError` unless it is a fraction from 0 to below 1."""
    sparsity = check_number("sparsity", sparsity)
    if not 0 <= sparsity < 1:
        hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(f"`sparsity` is {sparsity:g}; allowed are fractions from 0 to below 1.{hint}")
    return sparsity


def _rounded(count: float, multiple: int, limit: int) -> int:
    return min(limit, max(multiple, math.floor(count / multiple + 0.5) * multiple))


def unit_activity(squares: Sequence[Tensor], readers: Sequence[Tensor]) -> Tensor:
    """
    The score of every unit by how much it contributes on data: the sum over its readers of the mean of h², where h is
    what the reader is given, times the squared norm of the reader's weights for it.

    Args:
        squares (`Sequence[Tensor]`): for each reader, the mean of h² over samples and positions, `[num_units, n]`. For
            an expert h is multiplied by its share in the output, and zero at positions that it does not get: the sum
            over those that it gets is divided by the number of all.
        readers (`Sequence[Tensor]`): for each reader, its weights for each unit, `[num_units, n, …]`.

    Returns:
        `float64 [num_units]`.
    """
    parts = (
        mean.double() * weight.double().square().flatten(2).sum(2)
        for mean, weight in zip(squares, readers, strict=True)
    )
    return torch.stack([part.sum(1) for part in parts]).sum(0)


def weight_activity(weight: Tensor, squares: Tensor) -> Tensor:
    """
    The score |w| · ‖x‖ of every weight (Wanda, arXiv 2306.11695), where ‖x‖ is the norm of the input that it
    multiplies, over samples and positions.

    Args:
        weight (`Tensor`): `[outputs, inputs, …]`, for a convolution with its kernel.
        squares (`Tensor`): the sum of x² for each of these, `[inputs, …]`; of a convolution with groups `[groups *
            inputs, …]`.

    Returns:
        `float64`, of the shape of `weight`.
    """
    groups = squares.shape[0] // weight.shape[1]
    norms = squares.double().sqrt().view(groups, 1, *weight.shape[1:])
    return (weight.double().abs().view(groups, -1, *weight.shape[1:]) * norms).view(weight.shape)


def _proportional_counts(total: int, sizes: list[int], limits: list[int]) -> list[int]:
    """
    Splits `total` in proportion to `sizes` by largest remainder, no part above its limit; integers only, so exact.

    Parts whose share exceeds their limit are set to it, and the rest is shared again, until all shares fit.
    """
    counts = [0] * len(sizes)
    open_parts = list(range(len(sizes)))
    while True:
        size = sum(sizes[part] for part in open_parts)
        over = [part for part in open_parts if total * sizes[part] > limits[part] * size]
        if not over:
            break
        for part in over:
            counts[part] = limits[part]
            total -= limits[part]
        open_parts = [part for part in open_parts if part not in over]
    if total == 0:
        return counts
    # Every share is at most its limit, and limits are whole, so rounding a share up stays within the limit.
    for part in open_parts:
        counts[part] = total * sizes[part] // size
    remaining = total - sum(counts[part] for part in open_parts)
    by_remainder = sorted(open_parts, key=lambda part: (-(total * sizes[part] % size), part))
    for part in by_remainder[:remaining]:
        counts[part] += 1
    return counts


def _standard_deviation(layer: int, initial: Tensor) -> float:
    deviation = float(initial.double().std(correction=0))
    if not (math.isfinite(deviation) and deviation > 0):
        raise ValueError(
            f"`reference[{layer}]` has standard deviation {deviation}; scope 'global_normalised' divides by it, so it "
            "must be positive and finite."
        )
    return deviation


def round_schedule(
    num_weights: int,
    target_sparsity: Sequence[float],
    *,
    prune_schedule: str,
    prune_amount: float,
    counted: str = "weight",
) -> list[list[int]]:
    """
    The numbers of weights, or of units, kept after each prune event of each round.

    A round starts from what the previous one kept (the first from `num_weights`), and its last event is cut short to
    keep exactly `num_weights - round(target * num_weights)`, with Python's rounding (halves to even).

    Args:
        num_weights (`int`): number of prunable weights.
        target_sparsity (`Sequence[float]`): one target per round, a fraction of `num_weights`, strictly increasing
            within `[0, 1)`. A first target of 0 is a round without events: dense tickets.
        prune_schedule (`str`): what an event removes.
            `"geometric"`: the fraction `prune_amount` of the surviving weights.
            `"linear"`: the fraction `prune_amount` of `num_weights`.
            `"constant"`: `prune_amount` weights (the paper's 4,096).
            A fraction is rounded to whole weights, and to one weight at least.
        prune_amount (`float`): strictly between 0 and 1 for the fractions, a positive whole number for `"constant"`.
        counted (`str`, defaults to `"weight"`): what is counted, such as `"neuron"`, for errors.

    Returns:
        `list[list[int]]`: per round, the strictly decreasing kept counts after its events.

    Raises:
        TypeError: `num_weights` is not an integer, `prune_amount` or a target not a number.
        ValueError: a value out of range, an unknown `prune_schedule`, targets that do not increase, or that differ by
            less than a weight, or that keep nothing.

    Example:
        >>> round_schedule(100, [0.25, 0.5], prune_schedule="constant", prune_amount=20)
        [[80, 75], [55, 50]]
    """
    num_weights = check_integer("num_weights", num_weights)
    if num_weights < 1:
        raise ValueError(f"`num_weights` is {num_weights}; at least 1 weight is needed.")
    check_choice("prune_schedule", prune_schedule, PRUNE_SCHEDULES)
    _check_amount(prune_schedule, prune_amount)
    targets = _check_targets(target_sparsity)

    rounds: list[list[int]] = []
    kept = num_weights
    for target in targets:
        goal = num_weights - round(target * num_weights)
        if goal == 0:
            raise ValueError(f"`target_sparsity` has {target}, which keeps none of {num_weights} {counted}s.")
        if target > 0 and goal == kept:
            raise ValueError(
                f"`target_sparsity` has {target}, which removes no {counted} of {num_weights} beyond the "
                f"{num_weights - kept} removed before it."
            )
        events = []
        while kept > goal:
            if prune_schedule == "geometric":
                removed = round(prune_amount * kept)
            elif prune_schedule == "linear":
                removed = round(prune_amount * num_weights)
            else:
                removed = int(prune_amount)
            kept = max(goal, kept - max(1, removed))
            events.append(kept)
        rounds.append(events)
    return rounds


def random_masks(masks: Sequence[Tensor], *, generator: torch.Generator) -> list[Tensor]:
    """
    Masks that keep as many weights in total as `masks`, drawn uniformly over all weights of all layers.

    With a generator in the same state, masks of fewer weights are nested in masks of more.

    Args:
        masks (`Sequence[Tensor]`): the `bool` masks whose shapes, devices and total count are taken.
        generator (`torch.Generator`): the only source of randomness; it is advanced.

    Raises:
        TypeError: `masks` are not `bool` tensors.
        ValueError: `masks` is empty.
    """
    _check_masks(masks)
    sizes = [mask.numel() for mask in masks]
    order = torch.randperm(sum(sizes), generator=generator, device=generator.device)
    drawn = torch.zeros(sum(sizes), dtype=torch.bool, device=generator.device)
    drawn[order[: sum(int(mask.sum()) for mask in masks)]] = True
    return [part.view(mask.shape).to(mask.device) for part, mask in zip(drawn.split(sizes), masks, strict=True)]


def shuffled_masks(masks: Sequence[Tensor], *, generator: torch.Generator) -> list[Tensor]:
    """
    Masks that keep as many weights per layer as `masks`, at shuffled positions within each layer.

    Arguments and errors are those of `random_masks`.
    """
    _check_masks(masks)
    shuffled = []
    for mask in masks:
        order = torch.randperm(mask.numel(), generator=generator, device=generator.device).to(mask.device)
        shuffled.append(mask.flatten()[order].view(mask.shape))
    return shuffled


def emptied_layers(masks: Sequence[Tensor]) -> list[int]:
    """Indices of the layers of `masks` in which nothing is kept. Raises as `random_masks` does."""
    _check_masks(masks)
    return [layer for layer, mask in enumerate(masks) if not mask.any()]


def _check_masks(masks: Sequence[Tensor]) -> None:
    if len(masks) == 0:
        raise ValueError("`masks` is empty; it needs one `bool` tensor per layer.")
    for layer, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"`masks[{layer}]` is {_kind(mask)}; a `bool` tensor is needed.")


def _check_weights(name: str, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    if len(weights) != len(masks):
        raise ValueError(f"`{name}` has {len(weights)} layers and `masks` {len(masks)}; both need the same number.")
    for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"`{name}[{layer}]` is {_kind(weight)}; a floating point tensor is needed.")
        if weight.shape != mask.shape or weight.device != mask.device:
            raise ValueError(
                f"`{name}[{layer}]` is {list(weight.shape)} on {weight.device} and `masks[{layer}]` "
                f"{list(mask.shape)} on {mask.device}; shapes and devices must be equal."
            )


def _kind(value: object) -> str:
    return f"a `{value.dtype}` tensor" if isinstance(value, Tensor) else f"a `{type(value).__name__}`"


def _check_amount(schedule: str, amount: float) -> None:
    check_number("prune_amount", amount)
    if schedule == "constant":
        if not (amount >= 1 and float(amount).is_integer()):
            raise ValueError(
                f"`prune_amount` is {amount}; `prune_schedule` 'constant' removes a positive whole number of weights "
                "per event, as in `prune_amount=4096`. For a fraction use 'linear' or 'geometric'."
            )
    elif not 0 < amount < 1:
        hint = f"Did you mean {amount / 100:g}? " if 1 < amount < 100 else ""
        raise ValueError(
            f"`prune_amount` is {amount}; `prune_schedule` {schedule!r} takes a fraction strictly between 0 and 1, as "
            f"in `prune_amount=0.2`. {hint}For a number of weights use 'constant'."
        )


def _check_targets(target_sparsity: Sequence[float]) -> list[float]:
    if isinstance(target_sparsity, str):
        raise TypeError(f"`target_sparsity` is {target_sparsity!r}; fractions are needed, as in `[0.25, 0.5]`.")
    if isinstance(target_sparsity, numbers.Real):
        raise TypeError(f"`target_sparsity` is {target_sparsity}; a list is needed: `[{target_sparsity}]`.")
    targets = [check_number(f"target_sparsity[{k}]", target) for k, target in enumerate(target_sparsity)]
    if not targets:
        raise ValueError("`target_sparsity` is empty; it needs one target per round, as in `[0.25, 0.5, 0.75]`.")
    for position, target in enumerate(targets):
        if not 0 <= target < 1:
            hint = f" Did you mean {target / 100:g}?" if 1 < target < 100 else ""
            raise ValueError(f"`target_sparsity` has {target}; allowed are fractions from 0 to below 1.{hint}")
        if position > 0 and target <= targets[position - 1]:
            raise ValueError(f"`target_sparsity` are {targets}; they must increase strictly.")
    return targets
