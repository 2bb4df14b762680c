"""One ticket as a plain model. Without the channels that never matter, it has smaller tensors and equal outputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel, TimmWrapperConfig
from transformers.pytorch_utils import Conv1D

from .channel_graph import ChannelGraph
from .image_processing import configured_shape
from .masking import mask_weight, ordinary_tensors
from .norm_statistics import tracked_buffers
from .routed_model import RoutedModel
from .structure import save_shared_tensors


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerChannels:
    """Input and output channels of a layer, before and after."""

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class StructureReport:
    """What [`remove_dead_channels`] did: every convolution and linear layer, and the number of all parameters."""

    layers: list[LayerChannels]
    num_parameters: tuple[int, int]

    @property
    def changed(self) -> bool:
        return self.num_parameters[0] != self.num_parameters[1]

    def __str__(self) -> str:
        rows = [
            f"{layer.name:60} in {layer.inputs[0]:>6} -> {layer.inputs[1]:>6}  "
            f"out {layer.outputs[0]:>6} -> {layer.outputs[1]:>6}"
            for layer in self.layers
            if layer.inputs[0] != layer.inputs[1] or layer.outputs[0] != layer.outputs[1]
        ]
        return "\n".join([*rows, f"parameters {self.num_parameters[0]:,} -> {self.num_parameters[1]:,}"])


@torch.no_grad()
def extract_ticket(
    model: RoutedModel,
    route: int,
    *,
    masked: bool = True,
    prune_structure: bool = False,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """
    See [`RTLModel.extract_ticket`]; `route` is an index, or -1 for the union. If not `masked`, all weights are kept.
    """
    model.masker.locate()
    # Inference tensors could not be trained, and other kernels compute with them.
    with ordinary_tensors():
        ticket = copy.deepcopy(model.backbone)
    for name, rows in zip(model.mask_bank.weight_names, model.mask_bank.packed, strict=True) if masked else ():
        weight = ticket.get_parameter(name)
        weight.copy_(mask_weight(rows, route, weight.detach()))
    if model.norm_statistics is not None:
        for (module, name), row in zip(tracked_buffers(ticket), model.norm_statistics.row(route), strict=True):
            module.get_buffer(name).copy_(row)
    private = model.private_parameters
    for own, rows, row in zip(private.own(ticket), private.rows, private.row(route), strict=True):
        own.copy_(row)
        own.requires_grad_(rows.requires_grad)
    if model.config.ticket_task == "membership":
        name = model.route_name(route)
        ticket.config.id2label, ticket.config.label2id = {0: name}, {name: 0}
        if isinstance(ticket.config, TimmWrapperConfig):
            # The field that it saves instead, which a configuration from a file already has.
            ticket.config.label_names = [name]
    save_shared_tensors(ticket)
    if prune_structure:
        report = remove_dead_channels(ticket, example_inputs)
        logger.info("Channels of the ticket of route %s:\n%s", model.route_name(route), report)
        if report.changed:
            ticket.save_pretrained = ticket.push_to_hub = refuse_to_save
    return ticket


@torch.no_grad()
def remove_dead_channels(model: nn.Module, example_inputs: Mapping[str, Tensor] | None = None) -> StructureReport:
    """
    Removes, in place, the channels of `model` that never matter to its outputs in evaluation mode.

    A channel is removed if one of these holds for each layer that reads it: the layer multiplies it by zero weights;
    the channel is zero for every input (as when all weights that make it are zero, and bias, batch norm and activation
    keep it zero); the layer makes of it only channels that are removed, too. This is exact: every dropped term is
    zero. Outputs agree to rounding (1e-12 relative in float64, 1e-6 in float32), not to the bit, since shorter sums
    are added in another order.

    Channels are followed through convolutions (in grouped ones, also depthwise, only whole groups are removed), linear
    layers, batch norm, activations, pooling, elementwise sums and products, concatenation, reshaping. Channels stay
    where they enter anything else: norms over channels (so residual streams of transformers), attention, transposed
    convolutions. A layer keeps at least one channel. A model whose outputs do not depend on all of its parameters does
    not change. Every tensor that the model returns for `example_inputs` is an output, also a nested one; hidden states
    that only a later call requests lack channels. Shapes no longer follow the configuration.

    Args:
        model (`nn.Module`): a network that `torch.export` takes.
        example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, two samples or more. Defaults to
            images of the configured size, or to `model.dummy_inputs`.

    Returns:
        [`StructureReport`]: channels and parameters before and after.

    Raises:
        ValueError: no `example_inputs`, and none can be made for this model.
    """
    inputs = make_example_inputs(model) if example_inputs is None else example_inputs
    inputs = {name: _double(tensor) for name, tensor in inputs.items()}
    # Constants are computed in float64, so that rounding decides nothing.
    original = copy.deepcopy(model).to("cpu", torch.float64).eval()
    exported = torch.export.export(TensorOutputs(original), (), inputs, strict=False).run_decompositions({})
    expected = TensorOutputs(original)(**inputs)
    for follows_splits in (True, False):
        graph = ChannelGraph(exported, "model.", original, follows_splits=follows_splits)
        kept = {} if graph.unread else graph.kept()
        smaller = copy.deepcopy(original) if follows_splits else original
        slice_channels(smaller, kept)
        if _agree(smaller, inputs, expected):
            break
    else:
        logger.warning("No channels are removed: this model's code depends on how many there are.")
        kept = {}
    if graph.unread:
        logger.warning(
            "No channels are removed: the outputs do not depend on all parameters (%s), so it is unknown what else "
            "reads their channels.",
            ", ".join(graph.unread[:3]),
        )
    sizes, num_parameters = _sizes(model), _num_parameters(model)
    slice_channels(model, kept)
    layers = [LayerChannels(name, *zip(sizes[name], smaller, strict=True)) for name, smaller in _sizes(model).items()]
    return StructureReport(layers, (num_parameters, _num_parameters(model)))


def make_example_inputs(model: Any) -> dict[str, Tensor]:
    """
    Inputs that `model` takes: random images of the size in its configuration, or its `dummy_inputs` of tokens.

    Raises:
        ValueError: `model` takes something else.
    """
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        return dict(model.dummy_inputs)
    if name != "pixel_values":
        raise ValueError(
            f"`example_inputs` cannot be made for {type(model).__name__}, which takes {name!r}: give the arguments of "
            "a forward, as in `example_inputs={'input_values': torch.randn(2, 16000)}`."
        )
    return {name: torch.randn(2, *configured_shape(model))}


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Raises `ValueError`, in place of `save_pretrained`, if a model's shapes do not follow its configuration."""
    raise ValueError(
        "channels or units of this ticket were removed, so its shapes do not follow its configuration, and what "
        "`save_pretrained` writes could not be loaded. Save `torch.export.export(ticket, …)` with "
        "`torch.export.save`, or export it to ONNX; or extract the ticket without `prune_structure` and `small`."
    )


class TensorOutputs(nn.Module):
    """Gives only the tensors that a model returns, since `torch.export` refuses caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors_in(self.model(**inputs)))


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, however nested."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors_in(value)


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def _agree(model: nn.Module, inputs: Mapping[str, Tensor], expected: tuple[Tensor, ...]) -> bool:
    """Whether `model` still runs and gives `expected`: its own code may depend on the number of channels."""
    try:
        outputs = TensorOutputs(model)(**inputs)
    except Exception:  # whatever that code raises
        return False
    # In float64, as outputs may be `bool`.
    pairs = [(output.double(), one.double()) for output, one in zip(outputs, expected, strict=True)]
    return all(
        output.shape == one.shape and bool((output - one).abs().max() <= 1e-6 * one.abs().max())
        for output, one in pairs
    )


def slice_channels(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """
    Keeps the indices `kept` of parameters and buffers, wherever they are registered, and sets layers' sizes. Indices
    `[experts, n]` are those of each expert of a stack.
    """
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sliced: dict[int, Tensor] = {}
    for name, dims in kept.items():
        tensor = names[name]
        smaller = tensor.detach()
        for dim, indices in dims.items():
            smaller = _select(smaller, dim, indices.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        sliced[id(tensor)] = smaller
    for module in model.modules():
        places: list[Any] = [module._parameters, module._buffers]
        for tensors in places:
            changed = {key: sliced[id(tensor)] for key, tensor in tensors.items() if id(tensor) in sliced}
            if changed:
                tensors.update(changed)
                _set_size(module)


def _select(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    if indices.ndim == 1:
        return tensor.index_select(dim, indices)
    return torch.stack([part.index_select(dim, own) for part, own in zip(tensor, indices, strict=True)])


def _set_size(module: Any) -> None:
    """Sets the numbers of channels that a layer keeps beside its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, _BatchNorm):
        module.num_features = len(module.weight if module.running_mean is None else module.running_mean)
    elif isinstance(module, _ConvNd):
        if module.groups > 1:
            module.groups = module.groups * len(module.weight) // module.out_channels
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups


def _sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Input and output channels of every convolution and linear layer."""
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            sizes[name] = (module.nx, module.nf)
        elif isinstance(module, _ConvNd):
            sizes[name] = (module.in_channels, module.out_channels)
    return sizes


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
