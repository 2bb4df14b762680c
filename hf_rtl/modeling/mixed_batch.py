"""Reads the routes of a batch, splits the batch by route, and merges the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


# Which samples of a batch belong to a route.
Positions = Tensor | slice


def first_tensor(inputs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in inputs.values() if isinstance(value, Tensor)), None)


def check_samples(inputs: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the batch has no samples."""
    main = first_tensor(inputs)
    if main is not None and main.ndim and not len(main):
        raise ValueError(f"the batch has no samples: its first tensor has the shape {tuple(main.shape)}.")


def read_route_ids(
    route_ids: Any, inputs: Mapping[str, Any], route_index: Callable[[int | str], int]
) -> int | list[int]:
    """
    The indices of the routes that a caller names: one for all samples as an `int`, else one per sample.

    Args:
        route_ids (`int`, `str`, `Tensor` or `list`): see `forward`.
        inputs (`Mapping[str, Any]`): those of the same call; the first tensor gives the number of samples.
        route_index (`Callable`): from an index or a name to an index; raises for an unknown one.

    Raises:
        TypeError: a tensor that is not `[batch]` or of integers.
        ValueError: no entries, or not as many as there are samples.
    """
    if isinstance(route_ids, str) or not isinstance(route_ids, (Tensor, list, tuple)):
        return route_index(route_ids)
    if isinstance(route_ids, Tensor):
        if route_ids.is_floating_point() or route_ids.dtype == torch.bool or route_ids.ndim > 1:
            raise TypeError(f"`route_ids` must be integers [batch], got {route_ids.dtype} {tuple(route_ids.shape)}.")
        if route_ids.ndim == 0:
            return route_index(int(route_ids))
        route_ids = route_ids.tolist()
    main = first_tensor(inputs)
    if not route_ids:
        raise ValueError("`route_ids` is empty; give one route per sample.")
    if main is not None and len(route_ids) != len(main):
        raise ValueError(f"`route_ids` has {len(route_ids)} entries for a batch of {len(main)}; give one per sample.")
    return [route_index(route) for route in route_ids]


def batch_device(inputs: Mapping[str, Any]) -> torch.device:
    """The device of a batch. That of a model is none where its weights are offloaded."""
    main = first_tensor(inputs)
    return torch.device("cpu") if main is None else main.device


def positions_by_route(route_ids: Sequence[int]) -> dict[int, list[int]]:
    """Route -> positions of its samples, routes and positions ascending."""
    positions: dict[int, list[int]] = {}
    for position, route in enumerate(route_ids):
        positions.setdefault(route, []).append(position)
    return dict(sorted(positions.items()))


def group_by_route(route_ids: Sequence[int], device: torch.device) -> dict[int, Positions]:
    """As `positions_by_route`: a slice where the samples of a route are neighbours, else `int64` indices."""
    return {route: _as_slice(positions, device) for route, positions in positions_by_route(route_ids).items()}


def _as_slice(positions: list[int], device: torch.device) -> Positions:
    first, last = positions[0], positions[-1]
    return slice(first, last + 1) if last - first < len(positions) else torch.tensor(positions, device=device)


def count(positions: Positions) -> int:
    """How many positions there are."""
    return positions.stop - positions.start if isinstance(positions, slice) else len(positions)


def select_samples(inputs: Mapping[str, Any], positions: Positions, batch_size: int) -> dict[str, Any]:
    """
    The samples at `positions` of batch-first tensors: views if these are neighbours, else copies. Other values, and
    tensors of one row, are returned unchanged.

    Raises:
        ValueError: a tensor with another first dimension.
    """

    def select(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or (len(value) == 1 and batch_size != 1):
            return value
        if len(value) != batch_size:
            raise ValueError(
                f"`{name}` has {len(value)} rows for a batch of {batch_size}; inputs of a batch with several routes "
                "must be batch-first."
            )
        return value[positions] if isinstance(positions, slice) else value.index_select(0, positions.to(value.device))

    return {name: select(name, value) for name, value in inputs.items()}


def num_loss_terms(labels: Tensor | None, num_samples: int, *, ignored: int, shifted: bool) -> Tensor:
    """
    Terms in the mean loss of a group, up to a factor: its samples, or its labelled tokens or pixels.

    Args:
        labels (`Tensor`, *optional*): of the group.
        num_samples (`int`): in the group.
        ignored (`int`): the label of what has none.
        shifted (`bool`): whether the first position predicts nothing.
    """
    if labels is None or labels.ndim < 2 or labels.is_floating_point():
        return torch.tensor(num_samples)
    return ((labels[:, 1:] if shifted else labels) != ignored).sum()


def merge_outputs(outputs: Sequence[Mapping[str, Any]], groups: Sequence[Positions], sizes: Sequence[Tensor]) -> dict:
    """
    Fields of the whole batch from those of its groups.

    Args:
        outputs: one mapping per group with the same fields.
        groups: the samples' positions in the batch, per group.
        sizes: weight of each group's `loss`: its number of samples, or of labelled tokens.

    Raises:
        ValueError: a field is neither batch-first nor the loss.
    """
    merged: dict[str, Any] = {}
    for name in outputs[0]:
        values = [output[name] for output in outputs]
        if name == "loss":
            losses = torch.stack(values)
            weights = torch.stack([size.to(losses.device) for size in sizes]).to(losses.dtype)
            # The mean loss of a group without a labelled token is NaN. Its weight is 0.
            losses = torch.where(weights > 0, losses, torch.zeros_like(losses))
            merged[name] = (losses * weights).sum() / weights.sum()
        else:
            merged[name] = _merge(name, values, groups)
    return merged


def _merge(name: str, values: Sequence[Any], groups: Sequence[Positions]) -> Any:
    if isinstance(values[0], (tuple, list)):
        return tuple(_merge(name, parts, groups) for parts in zip(*values, strict=True))
    batch_first = all(
        isinstance(value, Tensor) and value.ndim > 0 and len(value) == count(group)
        for value, group in zip(values, groups, strict=True)
    )
    if not batch_first:
        raise ValueError(
            f"the output `{name}` is not batch-first, so a batch with several routes cannot be put back together; "
            "turn it off (as with `use_cache=False`) or call the model once per route."
        )
    spans = [group for group in groups if isinstance(group, slice)]
    if len(spans) == len(groups):
        return torch.cat([values[k] for k in sorted(range(len(spans)), key=lambda k: spans[k].start)])
    device = values[0].device
    order = torch.cat(
        [
            torch.arange(group.start, group.stop, device=device) if isinstance(group, slice) else group.to(device)
            for group in groups
        ]
    ).argsort()
    return torch.cat(list(values)).index_select(0, order)
