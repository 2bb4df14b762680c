"""Finds channels that can never reach a network's outputs: follows them through the graph of `torch.export`."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node, map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from .structure import shared_tensors


aten: Any = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d: 1, aten.conv2d: 2, aten.conv3d: 3}
# Op -> number of last dimensions that it covers. Each op works on every channel by itself, and gives zero for zero.
_SPATIAL = {
    **{getattr(aten, f"{kind}_pool{num}d"): num for kind in ("max", "avg", "adaptive_avg") for num in (1, 2, 3)},
    aten.upsample_nearest2d: 2,
    aten.upsample_bilinear2d: 2,
}
_MEANS = {aten.mean.dim, aten.sum.dim_IntList}
_MOVES = {aten.permute.default, aten.transpose.int, aten.select.int}
_COPIES = {aten.alias, aten.clone, aten._to_copy, aten.detach}
_RESHAPES = {aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.flatten, aten.unflatten}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
# Pointwise ops that PyTorch does not tag as pointwise.
_POINTWISE = {aten.hardswish, aten.log_sigmoid}
_LAYERS = (nn.Linear, Conv1D, _ConvNd, _BatchNorm)


@dataclass
class Channels:
    """
    The channels along dimension `dim` of a tensor.

    `ids` names each; `value`, `float64`, is the value that a channel has everywhere for every input, or NaN.
    """

    dim: int
    ids: list[int]
    value: Tensor


@dataclass
class _Reader:
    """A matrix that makes channels `outputs` of channels `inputs`; `terms[o, i]`: whether i can add anything to o."""

    inputs: list[int]
    outputs: list[int]
    terms: np.ndarray


class ChannelGraph:
    """
    The channels of an exported network, and which of them never matter.

    A channel matters if it can be other than zero, and some layer multiplies it by a weight other than zero to make a
    channel that matters. All channels matter that enter an op which is not understood: transposed convolutions, norms
    over channels, attention, splits, anything unknown.

    Channels that can only be removed together are united: those added or multiplied elementwise, and inputs and
    outputs of one group of a grouped convolution.

    Args:
        exported (`torch.export.ExportedProgram`): of `model` in evaluation mode, functional.
        prefix (`str`): what stands before the names of parameters in `exported`.
        model (`nn.Module`): the network, float64. On the device `"meta"` all weights count as other than zero.
        follows_splits (`bool`, defaults to `True`): whether channels are followed where a tensor is split along them.
    """

    def __init__(
        self, exported: torch.export.ExportedProgram, prefix: str, model: nn.Module, *, follows_splits: bool = True
    ) -> None:
        self._follows_splits = follows_splits
        self._parts: dict[Node, list[Channels]] = {}
        # Channels of sums, as in a residual stream, and the dimensions of weights along which they read channels.
        self._added: list[int] = []
        self._inputs: set[tuple[str, int]] = set()
        self._parents: list[int] = []
        self._fixed: list[int] = []
        self._readers: list[_Reader] = []
        self._channels: dict[Node, Channels] = {}
        # Name of a parameter or buffer -> dimension -> channels along it.
        self._layout: dict[str, dict[int, list[int]]] = {}
        self._misused: set[str] = set()

        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names = {placeholder: name.removeprefix(prefix) for placeholder, name in names.items()}
        tensors, canonical, self._layer_tensors = _tensors(model)
        self._names: dict[Node, str] = {}
        self._tensors: dict[Node, Tensor] = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in names and names[node.name] in tensors:
                    self._names[node] = canonical[names[node.name]]
                    tensor = tensors[names[node.name]]
                    ones = torch.ones((), dtype=torch.float64)
                    self._tensors[node] = ones.expand(tensor.shape) if tensor.is_meta else tensor
            elif node.op == "call_function":
                self._follow(node)
            elif node.op == "output":
                self._release(node.all_input_nodes)
        read = {self._names[node] for node in self._names if node.users}
        # If the outputs do not depend on all parameters, it is unknown what else reads channels.
        self.unread = sorted({canonical[name] for name, _ in model.named_parameters()} - read)

    def units(self) -> list[dict[tuple[str, int], np.ndarray]]:
        """
        Groups of channels that can be removed one by one without any other: name of a parameter or buffer and a
        dimension -> `int64 [num_units, n]`, the indices along it of each unit of the group. Channels are left out that
        something reads that is not understood, or that are added to others, as in a residual stream.
        """
        stay = {self._root(id) for id in chain(self._all_fixed(), self._added)}
        places: dict[int, dict[tuple[str, int], list[int]]] = {}
        for name, dims in self._layout.items():
            for dim, ids in dims.items():
                for index, id in enumerate(ids):
                    places.setdefault(self._root(id), {}).setdefault((name, dim), []).append(index)
        groups: dict[tuple, list[dict[tuple[str, int], list[int]]]] = {}
        for root, found in places.items():
            if root not in stay and self._inputs & found.keys():
                key = tuple((place, len(indices)) for place, indices in found.items())
                groups.setdefault(key, []).append(found)
        return [{place: np.array([unit[place] for unit in units]) for place in units[0]} for units in groups.values()]

    def reads(self, name: str, dim: int) -> bool:
        """Whether the parameter `name` multiplies the channels along `dim`, rather than making them."""
        return (name, dim) in self._inputs

    def _all_fixed(self) -> list[int]:
        misused = (ids for name in self._misused & self._layout.keys() for ids in self._layout[name].values())
        return [*self._fixed, *chain.from_iterable(misused)]

    def kept(self) -> dict[str, dict[int, Tensor]]:
        """
        Name of a parameter or buffer -> dimension -> indices to keep along it, `int64`; only of those that lose any.

        At least one channel is kept in every layer.
        """
        roots = np.array([self._root(id) for id in range(len(self._parents))], dtype=np.int64)
        dead = np.ones(len(roots), dtype=bool)
        dead[roots[np.array(self._all_fixed(), dtype=np.int64)]] = False
        # Backwards: whether a layer's outputs matter must be known before its inputs are judged.
        for reader in reversed(self._readers):
            read = reader.terms[~dead[roots[reader.outputs]]].any(axis=0)
            dead[roots[reader.inputs][read]] = False
        # Every layer needs a channel. The one kept here does not matter, so neither does what it reads.
        axes = [roots[ids] for dims in self._layout.values() for ids in dims.values()]
        while any(dead[axis].all() for axis in axes):
            for axis in axes:
                if dead[axis].all():
                    dead[axis[0]] = False
        return {
            name: {dim: torch.from_numpy(np.flatnonzero(~dead[roots[ids]])) for dim, ids in dims.items()}
            for name, dims in self._layout.items()
            if any(dead[roots[ids]].any() for ids in dims.values())
        }

    # Channels

    def _fresh(self, count: int) -> list[int]:
        first = len(self._parents)
        self._parents += range(first, first + count)
        return self._parents[first:]

    def _unknown(self, dim: int, count: int) -> Channels:
        """Channels of a tensor that is not followed: all of them matter."""
        ids = self._fresh(count)
        self._fixed += ids
        return Channels(dim, ids, torch.full((count,), math.nan, dtype=torch.float64))

    def _root(self, id: int) -> int:
        while self._parents[id] != id:
            self._parents[id] = self._parents[self._parents[id]]
            id = self._parents[id]
        return id

    def _unite(self, ids: Iterable[int], others: Iterable[int]) -> None:
        for id, other in zip(ids, others, strict=True):
            self._parents[self._root(id)] = self._root(other)

    def _bind(self, node: Node, dim: int, ids: list[int]) -> None:
        """Records that the parameter at `node` has a slice for each of `ids` along `dim`."""
        bound = self._layout.setdefault(self._names[node], {}).setdefault(dim, ids)
        if bound is not ids:
            self._unite(bound, ids)

    def _release(self, nodes: Iterable[Node]) -> None:
        """Stops following `nodes`: their channels matter, and their parameters keep their shapes."""
        for node in nodes:
            if node in self._channels:
                self._fixed += self._channels[node].ids
            if node in self._names:
                self._misused.add(self._names[node])

    # Ops

    def _follow(self, node: Node) -> None:
        if node.target is aten._assert_tensor_metadata.default:
            return
        if self._follows_splits and self._split(node):
            return
        channels = self._result(node)
        if channels is None:
            self._release(node.all_input_nodes)
        else:
            self._channels[node] = channels

    def _split(self, node: Node) -> bool:
        """Whether `node` splits a tensor along its channels, or takes a part of one that was."""
        source, sizes, dim = _arguments(node)[:3]
        if node.target is operator.getitem and source in self._parts:
            self._channels[node] = self._parts[source][sizes]
            return True
        if node.target not in _SPLITS or source not in self._channels:
            return False
        channels = self._channels[source]
        if (dim or 0) % len(_shape(source)) != channels.dim:
            return False
        parts = zip(_in_parts(channels.ids, sizes), channels.value.split(sizes), strict=True)
        self._parts[node] = [Channels(channels.dim, ids, value) for ids, value in parts]
        return True

    def _result(self, node: Node) -> Channels | None:
        op, args = getattr(node.target, "overloadpacket", node.target), _arguments(node)
        if op in _CONVOLUTIONS:
            return self._convolution(node, _CONVOLUTIONS[op])
        if op is aten.linear:
            x, weight, bias = args[:3]
            return self._matrix(node, x, weight, bias, out_dim=0)
        if op is aten.addmm and not node.kwargs:
            bias, x, weight = args[:3]
            return self._matrix(node, x, weight, bias, out_dim=1)
        if op is aten.cat:
            return self._cat(node)
        if op is aten._native_batch_norm_legit_no_training:
            return self._batch_norm(node)
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        source = args[0]
        if op in _POINTWISE or _is_pointwise(node.target) and op not in _COPIES:
            return self._pointwise(node)
        if not isinstance(source, Node) or source not in self._channels or node.all_input_nodes != [source]:
            return None
        channels = self._channels[source]
        if op in _COPIES or op is operator.getitem and args[1] == 0:
            return channels if node.meta["val"].is_floating_point() else None
        return _rearranged(node, op, channels, _shape(source))

    def _convolution(self, node: Node, num_spatial: int) -> Channels | None:
        x, weight, bias, *_, groups = _arguments(node)[:7]
        groups = groups or 1
        if not self._are_layers(weight, bias):
            return None
        out_channels, group_inputs = self._tensors[weight].shape[:2]
        terms = (self._tensors[weight] != 0).flatten(2).any(2)
        channels = self._channels_along(x, len(_shape(x)) - num_spatial - 1)
        dim = len(_shape(node)) - num_spatial - 1
        if groups == 1:
            return self._multiplied(weight, bias, channels, terms, dim, 0)
        if channels is None:
            return None
        ids = self._fresh(out_channels)
        for together in np.hstack([np.reshape(part, (groups, -1)) for part in (channels.ids, ids)]).tolist():
            self._unite(together[1:], together[:-1])
        values = channels.value.view(groups, group_inputs).repeat_interleave(out_channels // groups, dim=0)
        return self._made(weight, bias, ids, terms & (values != 0), dim, 0)

    def _matrix(self, node: Node, x: Node, weight: Node, bias: Node | None, *, out_dim: int) -> Channels | None:
        if not self._are_layers(weight, bias):
            return None
        channels = self._channels_along(x, len(_shape(x)) - 1)
        terms = self._tensors[weight] != 0
        terms = terms if out_dim == 0 else terms.T
        return self._multiplied(weight, bias, channels, terms, len(_shape(node)) - 1, out_dim)

    def _channels_along(self, node: Node, dim: int) -> Channels | None:
        """The channels of `node` if they lie along `dim`; others are no longer followed."""
        channels = self._channels.get(node)
        if channels is None or channels.dim == dim:
            return channels
        self._release([node])
        return None

    def _multiplied(
        self, weight: Node, bias: Node | None, channels: Channels | None, terms: Tensor, dim: int, out_dim: int
    ) -> Channels:
        """
        The outputs of a layer, each a sum over all inputs; `terms`: `bool [outputs, inputs]`, weight not zero. The
        matrix `weight` has the outputs along `out_dim`, 0 or 1.
        """
        ids = self._fresh(len(terms))
        if channels is None:
            channels = self._unknown(dim, terms.shape[1])
        terms = terms & (channels.value != 0)
        self._bind(weight, 1 - out_dim, channels.ids)
        self._inputs.add((self._names[weight], 1 - out_dim))
        self._readers.append(_Reader(channels.ids, ids, terms.numpy()))
        return self._made(weight, bias, ids, terms, dim, out_dim)

    def _made(
        self, weight: Node, bias: Node | None, ids: list[int], terms: Tensor, dim: int, out_dim: int
    ) -> Channels:
        self._bind(weight, out_dim, ids)
        value = torch.zeros(len(ids), dtype=torch.float64)
        if bias is not None:
            self._bind(bias, 0, ids)
            value = self._tensors[bias].double()
        return Channels(dim, ids, value.masked_fill(terms.any(1), math.nan))

    def _batch_norm(self, node: Node) -> Channels | None:
        target: Any = node.target
        x, *parameters = _arguments(node)[:5]
        channels = self._channels.get(x)
        if channels is None or channels.dim != 1 or not self._are_layers(*parameters):
            return None
        for parameter in filter(None, parameters):
            self._bind(parameter, 0, channels.ids)
        tensors = [self._tensors.get(parameter) for parameter in parameters]
        value = target(channels.value[None], *tensors, *node.args[5:])[0][0]
        return Channels(1, channels.ids, value.masked_fill(channels.value.isnan(), math.nan))

    def _pointwise(self, node: Node) -> Channels | None:
        tracked = {source: self._channels[source] for source in node.all_input_nodes if source in self._channels}
        others = [source for source in node.all_input_nodes if source not in self._channels]
        if not tracked:
            return None
        # Counted from the last dimension, as broadcasting does.
        (position, size), *more = {(c.dim - len(_shape(source)), len(c.ids)) for source, c in tracked.items()}
        broadcast = all(len(_shape(other)) < -position or _shape(other)[position] == 1 for other in others)
        if more or not broadcast:
            return None
        self._release(others)
        first, *rest = tracked.values()
        for channels in rest:
            same = [*map(self._root, channels.ids)] == [*map(self._root, first.ids)]
            if node.target is not aten.mul.Tensor and not same:
                self._added += first.ids
            self._unite(channels.ids, first.ids)
        value = torch.full((size,), math.nan, dtype=torch.float64)
        known = ~torch.stack([channels.value for channels in tracked.values()]).isnan().any(0)
        if not others:
            values = {source: channels.value.nan_to_num() for source, channels in tracked.items()}
            for source, constant in values.items():
                if not source.meta["val"].is_floating_point():  # a comparison: `where` takes only `bool`
                    values[source] = constant.to(source.meta["val"].dtype)
            target: Any = node.target
            result = target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
            value = torch.where(known & result.isfinite(), result.double(), math.nan)
        if node.target is aten.mul.Tensor:
            for channels in tracked.values():
                value = value.masked_fill(channels.value == 0, 0.0)
        return Channels(len(_shape(node)) + position, first.ids, value)

    def _cat(self, node: Node) -> Channels | None:
        sources, dim = _arguments(node)[:2]
        dim = (dim or 0) % len(_shape(node))
        along = [self._channels[source].dim == dim for source in sources if source in self._channels]
        if not along or not all(along):
            return None
        self._release(source for source in sources if source not in self._channels)
        parts = [self._channels.get(source) or self._unknown(dim, _shape(source)[dim]) for source in sources]
        return Channels(dim, [id for part in parts for id in part.ids], torch.cat([part.value for part in parts]))

    def _are_layers(self, *nodes: Node | None) -> bool:
        """Whether each is `None` or a whole parameter or buffer of layers that can be given another shape."""
        return all(node is None or self._names.get(node) in self._layer_tensors for node in nodes)


def _rearranged(node: Node, op: Any, channels: Channels, shape: torch.Size) -> Channels | None:
    """The channels of a tensor that has been reshaped, permuted or pooled."""
    dim, ids, value = channels.dim, channels.ids, channels.value
    new_shape, (_, *args) = _shape(node), _arguments(node)
    zeros = torch.where(value == 0, 0.0, math.nan).double()
    if op in _SPATIAL or op is aten.constant_pad_nd:
        num_spatial = _SPATIAL[op] if op in _SPATIAL else len(args[0]) // 2
        pads_zeros = op in _SPATIAL or not args[1]
        if dim >= len(shape) - num_spatial:
            return None
        return Channels(dim, ids, zeros if pads_zeros else torch.full_like(value, math.nan))
    if node.target in _MEANS | _MOVES:
        # With a size that no other dimension has, the dimension of the channels is known again in the result.
        mark = max(shape) + 1
        marked = torch.empty((*shape[:dim], mark, *shape[dim + 1 :]), device="meta")
        target: Any = node.target
        sizes = target(marked, *node.args[1:], **node.kwargs).shape
        return Channels(sizes.index(mark), ids, zeros if node.target in _MEANS else value) if mark in sizes else None
    if op in _RESHAPES or node.target in (aten.squeeze.dim, aten.squeeze.dims):
        before = math.prod(shape[:dim])
        for new_dim, size in enumerate(new_shape):
            # In row-major order the new dimension holds all of a channel before the next one begins.
            repeats, remainder = divmod(size, shape[dim])
            if math.prod(new_shape[:new_dim]) == before and remainder == 0 and repeats > 0:
                repeated = np.repeat(ids, repeats).tolist()
                return Channels(new_dim, repeated, value.repeat_interleave(repeats))
    return None


def _in_parts(ids: list[int], sizes: int | list[int]) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor(ids).split(sizes)]


def _is_pointwise(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _arguments(node: Node) -> list[Any]:
    """The positional arguments, then eight `None` for those left out."""
    return [*node.args, *[None] * 8]


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """
    Parameters and buffers under all their names; every name -> the first name of its tensor; the first names of the
    tensors that only layers of known kinds hold.
    """
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    tensors, shared = {**dict(parameters), **dict(buffers)}, shared_tensors(model)
    canonical = {name: shared.get(name, name) for name in tensors}
    holders = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    foreign = {canonical[name] for name, holder in holders.items() if not isinstance(holder, _LAYERS)}
    foreign |= {canonical[name] for name, holder in holders.items() if isinstance(holder, _ConvTransposeNd)}
    return tensors, canonical, set(canonical.values()) - foreign
