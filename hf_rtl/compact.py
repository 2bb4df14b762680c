"""The compact form of a model's file: weights that no ticket keeps are left out, and masks are coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .mask_bank import MaskBank, fold, pack, unpack
from .mask_coding import decode, encode


# Tensors in the file.
_UNION, _MASKS, _WEIGHT = "compact.union", "compact.masks", "compact.w{:04d}"


def compact_state(
    state: Mapping[str, Tensor], weights: Sequence[Tensor], bank: MaskBank
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    A model's state without what no ticket needs.

    Args:
        state (`Mapping[str, Tensor]`): as of `state_dict()`.
        weights (`Sequence[Tensor]`): the prunable ones, in the bank's order.
        bank (`MaskBank`): the masks.

    Returns:
        The state, with `compact.w0000 [num_kept], …` in place of the weights: those that any ticket keeps, in the
        order of their positions, unless there are none. And, where that is smaller, in place of the masks
        `compact.union`, the coded bits of their union, and `compact.masks`, the coded bits that all routes have for
        the weights of the union. Then the codings of these two, by name.
    """
    codings, coded = coded_masks(bank)
    replaced = {weight.data_ptr() for weight in weights}
    if coded:
        replaced |= {rows.data_ptr() for rows in bank.packed}
    compact = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in replaced}
    for index, (weight, kept) in enumerate(zip(weights, bank.union(), strict=True)):
        if kept.any():
            compact[_WEIGHT.format(index)] = weight.detach()[kept.to(weight.device)]
    return compact | coded, codings


def coded_masks(bank: MaskBank) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The masks of all routes as the compact form has them, codings and tensors; none if they are smaller as bits."""
    union = bank.packed_union()
    columns = [
        _columns(rows, unpack(row, (shape.numel(),)))
        for rows, row, shape in zip(bank.packed, union, bank.shapes, strict=True)
    ]
    codings, coded = {}, {}
    for name, packed in ((_UNION, torch.cat(union)), (_MASKS, torch.cat(columns, dim=1).view(-1))):
        codings[name], coded[name] = encode(packed)
    smaller = sum(tensor.nbytes for tensor in coded.values()) < sum(rows.nbytes for rows in bank.packed)
    return (codings, coded) if smaller else ({}, {})


def expand_state(
    tensors: Mapping[str, Tensor], codings: Mapping[str, str], weight_keys: Sequence[str], bank: MaskBank
) -> dict[str, Tensor]:
    """
    The state that `compact_state` made `tensors` of. Weights that were left out are zero.

    Args:
        tensors (`Mapping[str, Tensor]`), codings (`Mapping[str, str]`): what `compact_state` returned.
        weight_keys (`Sequence[str]`): names of the prunable weights in the state, in the bank's order.
        bank (`MaskBank`): gives the weights' shapes and the number of routes. Its masks are of no concern.

    Raises:
        ValueError: a tensor is missing, damaged, or does not fit the others.
    """
    mask_keys = [f"mask_bank.m{index:04d}" for index in range(len(bank.shapes))]
    missing = {*((_UNION, _MASKS) if codings else mask_keys)} - tensors.keys()
    if missing or (codings and codings.keys() != {_UNION, _MASKS}):
        raise ValueError(
            f"the compact checkpoint lacks {len(missing)} tensor(s) of masks ({', '.join(sorted(missing)[:3])}), or "
            f"the configuration how they are coded; it says {codings}."
        )
    state = {name: tensor for name, tensor in tensors.items() if name not in codings}
    if codings:
        state |= dict(zip(mask_keys, _decoded_masks(tensors, codings, bank), strict=True))
    for index, (key, mask_key, shape) in enumerate(zip(weight_keys, mask_keys, bank.shapes, strict=True)):
        rows, values = state[mask_key], state.pop(_WEIGHT.format(index), torch.empty(0))
        expected = (bank.num_routes, -(-shape.numel() // 8))
        if rows.dtype != torch.uint8 or rows.shape != expected:
            raise ValueError(
                f"the compact checkpoint has masks {rows.dtype} {tuple(rows.shape)} of {key}, expected torch.uint8 "
                f"{expected}: it is cut short, or saved from another model."
            )
        union = unpack(fold(rows, torch.bitwise_or), shape)
        if values.shape != (int(union.sum()),):
            raise ValueError(
                f"the compact checkpoint has {tuple(values.shape)} weights of {key}, of which the tickets keep "
                f"{int(union.sum())}: it is cut short, or its masks are damaged."
            )
        state[key] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(union, values)
    return state


def _decoded_masks(tensors: Mapping[str, Tensor], codings: Mapping[str, str], bank: MaskBank) -> list[Tensor]:
    """The packed masks, `uint8 [num_routes, ceil(n/8)]` of each weight."""
    sizes = [-(-shape.numel() // 8) for shape in bank.shapes]
    rows = decode(codings[_UNION], tensors[_UNION], sum(sizes)).split(sizes)
    unions = [unpack(row, (shape.numel(),)) for row, shape in zip(rows, bank.shapes, strict=True)]
    counts = [int(union.sum()) for union in unions]
    groups = -(-bank.num_routes // 8)
    columns = decode(codings[_MASKS], tensors[_MASKS], groups * sum(counts)).view(groups, sum(counts))
    parts = columns.split(counts, dim=1)
    return [_rows(part, union, bank.num_routes) for part, union in zip(parts, unions, strict=True)]


def _columns(rows: Tensor, kept: Tensor) -> Tensor:
    """
    Packed masks of one weight tensor, `uint8 [num_routes, ceil(n/8)]`, as `uint8 [ceil(num_routes/8), num_kept]`: a
    byte holds the bits of one weight for eight routes. Tickets are alike, so a coder finds few different bytes.
    """
    positions = kept.nonzero().view(-1)
    bits = torch.stack([unpack(row, kept.shape).index_select(0, positions) for row in rows])
    bits = torch.nn.functional.pad(bits, (0, 0, 0, -len(bits) % 8))
    groups, num_kept = len(bits) // 8, bits.shape[1]
    return pack(bits.view(groups, 8, num_kept).transpose(1, 2)).view(groups, num_kept)


def _rows(columns: Tensor, kept: Tensor, num_routes: int) -> Tensor:
    """The masks that `_columns` made `columns` of."""
    groups, num_kept = columns.shape
    bits = (
        unpack(columns.reshape(-1), (groups, num_kept, 8)).transpose(1, 2).reshape(8 * groups, num_kept)[:num_routes]
    )
    masks = torch.zeros(num_routes, len(kept), dtype=torch.bool, device=kept.device)
    masks[:, kept] = bits[:num_routes]
    return torch.stack([pack(mask) for mask in masks])
