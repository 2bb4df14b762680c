"""The file of a saved model: its compact form, coded masks, and the checks on loading."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checks import check_choice
from .mask_bank import MaskBank, fold, pack, unpack
from .routed_model import RoutedModel


# Names of tensors in a compact file.
_UNION, _MASKS, _WEIGHT = "compact.union", "compact.masks", "compact.w{:04d}"


def compact_state(
    state: Mapping[str, Tensor], weights: Sequence[Tensor], bank: MaskBank
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    A model's state without what no ticket needs.

    Args:
        state (`Mapping[str, Tensor]`): from `state_dict()`.
        weights (`Sequence[Tensor]`): the prunable weights, in the bank's order.
        bank (`MaskBank`): the masks.

    Returns:
        The state, and the codings of masks in it, by name. In the state, `compact.w0000 [num_kept], …` replace the
        weights: they hold the weights that any ticket keeps, by position; those without any are left out. Two tensors
        replace the masks where this is smaller: `compact.union`, the coded bits of their union, and `compact.masks`,
        the coded bits of all routes for the weights in the union.
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
    """The masks of all routes in compact form: codings and tensors by name, both empty if raw bits are smaller."""
    union = bank.packed_union()
    columns = [_columns(rows, kept.view(-1)) for rows, kept in zip(bank.packed, bank.unpack(union), strict=True)]
    codings, coded = {}, {}
    for name, packed in ((_UNION, torch.cat(union)), (_MASKS, torch.cat(columns, dim=1).view(-1))):
        codings[name], coded[name] = encode(packed)
    smaller = sum(tensor.nbytes for tensor in coded.values()) < sum(rows.nbytes for rows in bank.packed)
    return (codings, coded) if smaller else ({}, {})


def expand_state(
    tensors: Mapping[str, Tensor], codings: Mapping[str, str], weight_keys: Sequence[str], bank: MaskBank
) -> dict[str, Tensor]:
    """
    The state that `compact_state` turned into `tensors`. Weights that were left out are zero.

    Args:
        tensors (`Mapping[str, Tensor]`), codings (`Mapping[str, str]`): what `compact_state` returned.
        weight_keys (`Sequence[str]`): names of the prunable weights in the state, in the bank's order.
        bank (`MaskBank`): gives the weights' shapes and the number of routes. Its masks are not read.

    Raises:
        ValueError: a tensor is missing, damaged, or does not fit the others.
    """
    mask_keys = [f"mask_bank.m{index:04d}" for index in range(len(bank.shapes))]
    missing = {*((_UNION, _MASKS) if codings else mask_keys)} - tensors.keys()
    if missing or (codings and codings.keys() != {_UNION, _MASKS}):
        raise ValueError(
            f"the compact checkpoint lacks {len(missing)} tensor(s) of masks ({', '.join(sorted(missing)[:3])}), or "
            f"the configuration lacks their codings; it has {codings}."
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
    unions = [mask.view(-1) for mask in decode_masks(codings[_UNION], tensors[_UNION], bank)]
    counts = [int(union.sum()) for union in unions]
    groups = -(-bank.num_routes // 8)
    columns = decode(codings[_MASKS], tensors[_MASKS], groups * sum(counts)).view(groups, sum(counts))
    parts = columns.split(counts, dim=1)
    return [_rows(part, union, bank.num_routes) for part, union in zip(parts, unions, strict=True)]


def _columns(rows: Tensor, kept: Tensor) -> Tensor:
    """
    Packed masks of one weight tensor, `uint8 [num_routes, ceil(n/8)]`, as `uint8 [ceil(num_routes/8), num_kept]`: a
    byte holds the bits of one weight for eight routes. Tickets are similar, so a coder finds few different bytes.
    """
    positions = kept.nonzero().view(-1)
    bits = torch.stack([unpack(row, kept.shape).index_select(0, positions) for row in rows])
    bits = torch.nn.functional.pad(bits, (0, 0, 0, -len(bits) % 8))
    groups, num_kept = len(bits) // 8, bits.shape[1]
    return pack(bits.view(groups, 8, num_kept).transpose(1, 2)).view(groups, num_kept)


def _rows(columns: Tensor, kept: Tensor, num_routes: int) -> Tensor:
    """The inverse of `_columns`: the packed masks, `uint8 [num_routes, ceil(n/8)]`."""
    groups, num_kept = columns.shape
    bits = unpack(columns.reshape(-1), (groups, num_kept, 8)).transpose(1, 2).reshape(8 * groups, num_kept)
    masks = torch.zeros(num_routes, len(kept), dtype=torch.bool, device=kept.device)
    masks[:, kept] = bits[:num_routes]
    return torch.stack([pack(mask) for mask in masks])


RAW_CODING, DEFLATE_CODING = "raw", "deflate"
CODINGS = (RAW_CODING, DEFLATE_CODING)


def encode(packed: Tensor) -> tuple[str, Tensor]:
    """
    Codes bytes for a file.

    Args:
        packed (`Tensor`): `uint8 [num_bytes]`.

    Returns:
        The coding that gives fewer bytes, one of `CODINGS`, and the coded bytes, `uint8`.
    """
    data = packed.cpu().numpy().tobytes()
    # Bytes of a mask repeat in runs, where a layer is empty or full, but hardly ever as longer strings: a search for
    # those takes 20 times as long, and saves nothing.
    deflater = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_RLE)
    deflated = deflater.compress(data) + deflater.flush()
    if len(deflated) >= len(data):
        return RAW_CODING, packed.cpu()
    return DEFLATE_CODING, torch.from_numpy(np.frombuffer(deflated, np.uint8).copy())


def decode(coding: str, coded: Tensor, num_bytes: int) -> Tensor:
    """
    The bytes that `encode` coded, `uint8 [num_bytes]`.

    Raises:
        ValueError: an unknown coding, or coded bytes that are damaged or not of this length. At most `num_bytes` + 1
            are unpacked.
    """
    check_choice("coding", coding, CODINGS)
    if coded.dtype != torch.uint8 or coded.ndim != 1:
        raise ValueError(f"a coded mask must be torch.uint8 [num_bytes], got {coded.dtype} {tuple(coded.shape)}.")
    if coding == DEFLATE_CODING:
        inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            # One byte more, to notice bytes that are too many.
            data = inflater.decompress(coded.numpy().tobytes(), num_bytes + 1)
        except zlib.error as error:
            raise ValueError(f"a coded mask is damaged: {error}.") from None
        coded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    if len(coded) != num_bytes:
        raise ValueError(f"a coded mask is damaged: it has {len(coded)} bytes or more, expected {num_bytes}.")
    return coded


def decode_masks(coding: str, coded: Tensor, bank: MaskBank) -> list[Tensor]:
    """The mask, `bool` tensors of the shapes of `bank`, whose packed rows were coded one after the other."""
    sizes = [-(-shape.numel() // 8) for shape in bank.shapes]
    return bank.unpack(decode(coding, coded, sum(sizes)).split(sizes))


def check_loaded(model: RoutedModel, name: Any, info: Mapping[str, Any]) -> None:
    """
    Raises `ValueError` unless a checkpoint is complete, was saved as this class, and has its own masks.

    Args:
        model ([`RoutedModel`]): as loaded.
        name (`str` or path): of the checkpoint, for errors.
        info (`Mapping[str, Any]`): what `from_pretrained` says about keys with `output_loading_info=True`.
    """
    saved_as = (model.config.architectures or [type(model).__name__])[0]
    if saved_as not in [known.__name__ for known in type(model).__mro__]:
        raise ValueError(
            f"the checkpoint {str(name)!r} was saved as {saved_as}, which {type(model).__name__} "
            f"is not; RTLModel.from_pretrained loads it as {saved_as}."
        )
    # Anywhere in the name: for timm backbones the loader puts a prefix before names that it does not know.
    own = {"mask_bank", "norm_statistics", "private_parameters", "router"}
    foreign = [name for name in info["unexpected_keys"] if own & set(name.split("."))]
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    problems = {"has wrong sizes of": mismatched, "lacks": info["missing_keys"], "has unknown": foreign}
    for problem, names in problems.items():
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise ValueError(
                f"the checkpoint {str(name)!r} {problem} {len(names)} tensor(s) of this "
                f"model ({listed}): it is cut short, or saved from another model, or its `config.json` or an argument "
                "has changed what the configuration builds."
            )
    if model.config.mask_fingerprint is None:
        raise ValueError(
            f"the configuration of {str(name)!r} has no `mask_fingerprint`, so its masks "
            "cannot be checked: it was not written by `save_pretrained`."
        )
    model.mask_bank.validate(model.config.mask_fingerprint)


def align(model: nn.Module) -> None:
    """
    Copies the tensors that are not aligned in a mapped file to memory of their own.

    Kernels round differently on unaligned memory, and a loaded model must give the outputs that it gave when saved.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_cpu and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
