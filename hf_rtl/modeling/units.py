"""Units of a backbone: what lives and dies together, as the row of an up projection and the column of a down one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .channel_graph import ChannelGraph
from .experts import are_fused, fused_matrices
from .standalone import TensorOutputs, make_example_inputs


GRANULARITIES = ("weight", "neuron", "channel")


@dataclass(frozen=True)
class UnitLayer:
    """
    A layer of units.

    Args:
        name (`str`): the name of the first module that makes them.
        kind (`str`): `"neuron"` if a matrix reads them, `"channel"` if a convolution does.
        num_units (`int`): how many there are.
        places (`dict`): name of a parameter or buffer and one of its dimensions -> `int64 [num_units, n]`, the indices
            of each unit along it.
        readers (`list[tuple[str, int]]`): the places of the weights that read the units.
        expert (`int`, *optional*): the expert whose units these are, if the parameters stack those of several experts
            along their first dimension. Dimensions are then counted from the last.
    """

    name: str
    kind: str
    num_units: int
    places: dict[tuple[str, int], Tensor]
    readers: list[tuple[str, int]]
    expert: int | None = None

    def own(self, tensor: Tensor) -> Tensor:
        """A tensor of a parameter's shape, or the part of it that belongs to the expert: a view."""
        return tensor if self.expert is None else tensor[self.expert]


def find_units(backbone: nn.Module, example_inputs: Mapping[str, Tensor] | None = None) -> list[UnitLayer]:
    """
    The layers of units of a network, from its graph: no table of architectures is needed.

    A unit is a channel, with all that makes it and all that reads it, which can be removed without any other: a hidden
    neuron of a feed-forward block (gated or not), or a channel between two convolutions. Channels of residual streams,
    of norms over channels and of attention are no units. Fused experts, which no graph follows, have the neurons that
    the interface of transformers for experts says, in a layer for each expert; see [`are_fused`].

    Args:
        backbone (`nn.Module`): a network that `torch.export` takes. Neither its weights nor its memory are touched.
        example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, two samples or more. Defaults to
            images of the configured size, or to `dummy_inputs`.

    Raises:
        ValueError: no `example_inputs`, and none can be made for this network, or `torch.export` does not take it.
    """
    inputs = make_example_inputs(backbone) if example_inputs is None else dict(example_inputs)
    # On this device a network has shapes, but no memory.
    tensors = chain(backbone.parameters(), backbone.buffers())
    empty = copy.deepcopy(backbone, {id(tensor): _without_memory(tensor) for tensor in tensors}).eval()
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if any(map(are_fused, empty.modules())):
        # The loop over experts depends on data, which a graph cannot hold.
        empty.set_experts_implementation("batched_mm")  # type: ignore[operator]
    try:
        exported = torch.export.export(TensorOutputs(empty), (), inputs, strict=False).run_decompositions({})
    except Exception as error:  # whatever a model or torch raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`torch.export` cannot trace {type(backbone).__name__} with {', '.join(inputs)}, so its units are not "
            f"known: {type(error).__name__}: {reason}. Give other `example_inputs`, or use `granularity='weight'`."
        ) from error
    graph = ChannelGraph(exported, "model.", empty)
    return [*(_as_layer(graph, backbone, places) for places in graph.units()), *_of_experts(backbone)]


def _of_experts(backbone: nn.Module) -> Iterator[UnitLayer]:
    """A layer for each expert of fused ones."""
    for name, module in backbone.named_modules():
        if are_fused(module):
            experts: Any = module
            up, down = (f"{name}.{attribute}" for attribute in fused_matrices(experts))
            rows, columns = (-1, -2) if experts.is_transposed else (-2, -1)
            num_experts, num_units = experts.down_proj.shape[0], experts.down_proj.shape[columns]
            indices = torch.arange(num_units)[:, None]
            if experts.has_gate:
                pair = torch.arange(2 * num_units)
                made = pair.view(2, -1).T if experts.is_concatenated else pair.view(-1, 2)
            else:
                made = indices
            places = {(up, rows): made, (down, columns): indices}
            if experts.has_bias:
                places[f"{up}_bias", -1] = made
            for expert in range(num_experts):
                yield UnitLayer(f"{name}.{expert}", "neuron", num_units, places, [(down, columns)], expert)


def _as_layer(graph: ChannelGraph, backbone: nn.Module, places: Mapping[tuple[str, int], Any]) -> UnitLayer:
    readers = [place for place in places if graph.reads(*place)]
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim > 1}
    made = [name for name, dim in places if (name, dim) not in readers and name in matrices]
    reader = backbone.get_submodule(readers[0][0].rpartition(".")[0])
    return UnitLayer(
        name=(made or [readers[0][0]])[0].rpartition(".")[0],
        kind="channel" if isinstance(reader, _ConvNd) else "neuron",
        num_units=len(next(iter(places.values()))),
        places={place: torch.from_numpy(indices) for place, indices in places.items()},
        readers=readers,
    )


def _without_memory(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
