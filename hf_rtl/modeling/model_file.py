"""The file of a saved model: its compact form, and the checks on loading."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .files import read_json
from .mask_bank import MaskBank, fold, pack, unpack
from .mask_coding import decode, decode_bits, decode_units, encode, encode_rows, encode_units
from .routed_model import RoutedModel


# Names of tensors in a compact file.
_UNION, _MASKS, _UNITS, _PRIVATE = "compact.union", "compact.masks", "compact.units", "compact.private"
_WEIGHT, _LEFT = "compact.w{:04d}", "compact.p{:04d}"
# Names of the tensors that they replace.
_BANK_MASK, _PRIVATE_ROWS = "mask_bank.m{:04d}", "private_parameters.p{:04d}"


def compact_state(
    state: Mapping[str, Tensor], weights: Sequence[Tensor], bank: MaskBank, private_rows: Sequence[Tensor] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    A model's state without what no ticket needs.

    Args:
        state (`Mapping[str, Tensor]`): from `state_dict()`.
        weights (`Sequence[Tensor]`): the prunable weights, in the bank's order.
        bank (`MaskBank`): the masks.
        private_rows (`Sequence[Tensor]`): of private parameters, `[num_routes, ...]` each.

    Returns:
        The state, and the codings of masks in it, by name. In the state, `compact.w0000 [num_kept], …` replace the
        weights: they hold the weights that any ticket keeps, by position; those without any are left out. Two tensors
        replace the masks where this is smaller: `compact.union`, the coded bits of their union, and `compact.masks`,
        the coded bits of all routes for the weights in the union; or one, `compact.units`, the masks of each weight in
        all routes, coded by units. Where rows of private parameters have zeros for units, `compact.p0000 [num_left],
        …` replace them: all routes without these zeros; `compact.private` has the masks of what is left.
    """
    codings, coded = coded_masks(bank)
    replaced = {weight.data_ptr() for weight in weights}
    if coded:
        replaced |= {rows.data_ptr() for rows in bank.packed}
    kept_rows = encode_rows([row for rows in private_rows for row in rows])
    if kept_rows is not None:
        replaced |= {rows.data_ptr() for rows in private_rows}
        codings[_PRIVATE], coded[_PRIVATE] = kept_rows.coding, kept_rows.coded
        left = iter(kept_rows.left())
        parts = [torch.cat(list(islice(left, bank.num_routes))) for _ in private_rows]
        coded |= {_LEFT.format(index): part for index, part in enumerate(parts) if len(part)}
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
    found = (codings, coded) if _num_bytes(coded.values()) < _num_bytes(bank.packed) else ({}, {})
    masks = (unpack(row, shape) for rows, shape in zip(bank.packed, bank.shapes, strict=True) for row in rows)
    units = encode_units(masks)
    if units is not None and units[1].nbytes < _num_bytes(found[1].values() or bank.packed):
        return {_UNITS: units[0]}, {_UNITS: units[1]}
    return found


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def expand_state(
    tensors: Mapping[str, Tensor],
    codings: Mapping[str, str],
    weight_keys: Sequence[str],
    bank: MaskBank,
    private_shapes: Sequence[torch.Size] = (),
) -> dict[str, Tensor]:
    """
    The state that `compact_state` turned into `tensors`. What was left out is zero.

    Args:
        tensors (`Mapping[str, Tensor]`), codings (`Mapping[str, str]`): what `compact_state` returned.
        weight_keys (`Sequence[str]`): names of the prunable weights in the state, in the bank's order.
        bank (`MaskBank`): gives the weights' shapes and the number of routes. Its masks are not read.
        private_shapes (`Sequence[torch.Size]`): of the rows of private parameters.

    Raises:
        ValueError: a tensor is missing, damaged, or does not fit the others.
    """
    mask_keys = [_BANK_MASK.format(index) for index in range(len(bank.shapes))]
    of_masks = codings.keys() - {_PRIVATE}
    missing = {*codings, *(() if of_masks else mask_keys)} - tensors.keys()
    if missing or of_masks not in (set(), {_UNITS}, {_UNION, _MASKS}):
        raise ValueError(
            f"the compact checkpoint lacks {len(missing)} tensor(s) of masks ({', '.join(sorted(missing)[:3])}), or "
            f"the configuration lacks their codings; it has {codings}."
        )
    state = {name: tensor for name, tensor in tensors.items() if name not in codings}
    if of_masks:
        decoded = _decoded_units if _UNITS in codings else _decoded_masks
        state |= dict(zip(mask_keys, decoded(tensors, codings, bank), strict=True))
    for index, (key, mask_key, shape) in enumerate(zip(weight_keys, mask_keys, bank.shapes, strict=True)):
        rows, values = state[mask_key], state.pop(_WEIGHT.format(index), torch.empty(0))
        expected = (bank.num_routes, -(-shape.numel() // 8))
        if rows.dtype != torch.uint8 or rows.shape != expected:
            raise ValueError(
                f"the compact checkpoint has masks {rows.dtype} {tuple(rows.shape)} of {key}, expected torch.uint8 "
                f"{expected}: it is cut short, or saved from another model."
            )
        state[key] = _filled(unpack(fold(rows, torch.bitwise_or), shape), values, key)
    if _PRIVATE in codings:
        shapes = [shape[1:] for shape in private_shapes for _ in range(bank.num_routes)]
        masks = decode_units(codings[_PRIVATE], tensors[_PRIVATE], shapes)
        for index in range(len(private_shapes)):
            key, values = _PRIVATE_ROWS.format(index), state.pop(_LEFT.format(index), torch.empty(0))
            state[key] = _filled(torch.stack(list(islice(masks, bank.num_routes))), values, key)
    return state


def _filled(mask: Tensor, values: Tensor, key: str) -> Tensor:
    """A tensor with `values` where `mask` is set, and zeros elsewhere."""
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"the compact checkpoint has {tuple(values.shape)} weights of {key}, of which the tickets keep "
            f"{int(mask.sum())}: it is cut short, or its masks are damaged."
        )
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)


def _decoded_units(tensors: Mapping[str, Tensor], codings: Mapping[str, str], bank: MaskBank) -> list[Tensor]:
    """The packed masks, `uint8 [num_routes, ceil(n/8)]` of each weight, from masks coded by units."""
    shapes = [shape for shape in bank.shapes for _ in range(bank.num_routes)]
    packed = map(pack, decode_units(codings[_UNITS], tensors[_UNITS], shapes))
    return [torch.stack(list(islice(packed, bank.num_routes))) for _ in bank.shapes]


def _decoded_masks(tensors: Mapping[str, Tensor], codings: Mapping[str, str], bank: MaskBank) -> list[Tensor]:
    """The packed masks, `uint8 [num_routes, ceil(n/8)]` of each weight, from their union and bits in it."""
    unions = [mask.view(-1) for mask in decode_bits(codings[_UNION], tensors[_UNION], bank)]
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


def check_sizes(model: RoutedModel, files: Sequence[str], name: Any) -> None:
    """
    Raises `ValueError` if a model that is built, but has no memory yet, would need more of it than its files fill.

    Args:
        model ([`RoutedModel`]): on the device `"meta"`; on another one nothing is checked.
        files (`Sequence[str]`): of its checkpoint. Only their headers are read.
        name (`str` or path): of the checkpoint, for errors.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except OSError as error:  # the index of files may name a folder
            raise ValueError(f"{file!r}, of the checkpoint {str(name)!r}, cannot be read: {error}.") from error
    left_out = set(model.all_tied_weights_keys)
    state = model.state_dict(keep_vars=True)
    # A module that is registered twice has two names for a tensor, and its file has one.
    given = {id(tensor) for key, tensor in state.items() if key in found}
    left_out |= {key for key, tensor in state.items() if key not in found and id(tensor) in given}
    if model.config.compact is not None:
        left_out |= {f"backbone.{weight}" for weight in model.mask_bank.weight_names}
        left_out |= {key for key in state if key.startswith(("mask_bank.", "private_parameters."))}
    expected = {key: tuple(tensor.shape) for key, tensor in state.items() if tensor.is_meta and key not in left_out}
    wrong = [key for key, shape in expected.items() if found.get(key) != shape]
    others = sum(math.prod(shape) for key, shape in found.items() if expected.get(key) != shape)
    # Loading may rename tensors, split them and join them, which leaves the number of elements as it is.
    if sum(math.prod(expected[key]) for key in wrong) > 2 * others:
        of_other_sizes = [key for key in wrong if key in found]
        _refuse(name, {"has wrong sizes of": of_other_sizes, "lacks": [key for key in wrong if key not in found]})


def _refuse(name: Any, problems: Mapping[str, Collection[str]]) -> None:
    """Raises `ValueError` if any problem has names of tensors."""
    for problem, names in problems.items():
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise ValueError(
                f"the checkpoint {str(name)!r} {problem} {len(names)} tensor(s) of this "
                f"model ({listed}): it is cut short, or saved from another model, or its `config.json` or an argument "
                "has changed what the configuration builds."
            )


def check_index(name: Any, hub_arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the checkpoint of this `name` is in several files, and their index is damaged."""
    known = {key: hub_arguments[key] for key in ("revision", "cache_dir", "subfolder") if key in hub_arguments}
    file = cached_file(
        name, SAFE_WEIGHTS_INDEX_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False, **known
    )
    if file is None:
        return
    try:
        index = read_json(Path(file))
        whole = isinstance(index["metadata"], dict) and all(type(name) is str for name in index["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {str(name)!r} is damaged.")


def check_class(model: RoutedModel, name: Any) -> None:
    """Raises `ValueError` unless a checkpoint of this `name` was saved as the class of `model`."""
    saved_as = (model.config.architectures or [type(model).__name__])[0]
    if saved_as not in [known.__name__ for known in type(model).__mro__]:
        raise ValueError(
            f"the checkpoint {str(name)!r} was saved as {saved_as}, which {type(model).__name__} "
            f"is not; RTLModel.from_pretrained loads it as {saved_as}."
        )


def check_loaded(model: RoutedModel, name: Any, info: Mapping[str, Any]) -> None:
    """
    Raises `ValueError` unless a checkpoint is complete and has its own masks.

    Args:
        model ([`RoutedModel`]): as loaded.
        name (`str` or path): of the checkpoint, for errors.
        info (`Mapping[str, Any]`): what `from_pretrained` says about keys with `output_loading_info=True`.
    """
    # Anywhere in the name: for timm backbones the loader puts a prefix before names that it does not know.
    own = {"mask_bank", "norm_statistics", "private_parameters", "router"}
    foreign = [name for name in info["unexpected_keys"] if own & set(name.split("."))]
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    _refuse(name, {"has wrong sizes of": mismatched, "lacks": info["missing_keys"], "has unknown": foreign})
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
