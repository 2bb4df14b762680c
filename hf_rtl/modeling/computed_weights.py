"""Layers that compute with another weight than they hold, as standardised convolutions: zeros need not stay zeros."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from .mask_bank import MaskBank


logger = logging.getLogger(__name__)

_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class _Products(TorchFunctionMode):
    """Keeps the weight of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS:
            self.weights.append(args[1])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def computed_weight(layer: nn.Module, weight: Tensor, **others: Tensor) -> Tensor:
    """
    What `layer`, a convolution or linear layer, multiplies its input by if it holds `weight` and these `others`;
    `weight`, if that is unknown.
    """
    if isinstance(layer, _ConvNd):
        extents = (step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True))
        example = weight.new_zeros(1, layer.in_channels, *extents)
    else:
        example = weight.new_zeros(1, weight.shape[1])
    holding = copy.copy(layer)
    holding.__dict__.update(others, weight=weight)
    with _Products() as products:
        try:
            holding(example)
        except Exception:  # whatever a layer raises that wants more arguments
            return weight
    return next((seen for seen in products.weights if seen.shape == weight.shape), weight)


def changed_layers(backbone: nn.Module, weight_names: Sequence[str]) -> dict[str, Any]:
    """Name -> layer, for those of these weights of which zeros are other values where the layer computes."""
    found = {}
    for name in weight_names:
        layer = backbone.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear | _ConvNd) and type(layer).forward.__module__.partition(".")[0] != "torch":
            # Not its own parameters, some of which are zero at first.
            held = {name: torch.ones_like(own) for name, own in layer.named_parameters(recurse=False)}
            held["weight"] = torch.linspace(1, 2, layer.weight.numel()).view_as(layer.weight).to(layer.weight)
            held["weight"].view(-1)[::2] = 0
            if computed_weight(layer, **held).reshape(-1)[::2].any():
                found[name] = layer
    return found


def warn_of_changed_weights(backbone: nn.Module, weights: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Warns if some of these weights, given by names and shapes, are changed by their layers before they are used."""
    layers = changed_layers(backbone, [name for name, _ in weights])
    if layers:
        total = sum(math.prod(shape) for _, shape in weights)
        size = sum(layer.weight.numel() for layer in layers.values())
        kinds = sorted({type(layer).__name__ for layer in layers.values()})
        logger.warning(
            f"{size:,} of the {total:,} prunable weights ({size / total:.0%}) are in layers that compute with another "
            f"weight than they hold ({', '.join(kinds)}): standardisation moves the zeros of masks, so that sparsity "
            "means little there. `prunable_report()` says what share is zero where they compute; `prune_exclude` "
            "leaves them out."
        )


def changed_weights_report(backbone: nn.Module, bank: MaskBank) -> str:
    """What share of the weights in such layers is zero, in masks and where the layers compute; empty without any."""
    layers = changed_layers(backbone, bank.weight_names)
    if not layers:
        return ""
    pruned = zero = size = 0
    for route in range(bank.num_routes):
        for name, kept in zip(bank.weight_names, bank[route], strict=True):
            if name in layers:
                weight = layers[name].weight.detach()
                computed = computed_weight(layers[name], torch.where(kept.to(weight.device), weight, 0))
                pruned += int((~kept).sum())
                zero += int((computed == 0).sum())
                size += kept.numel()
    return (
        f"\n{size // bank.num_routes:,} of the prunable weights are in layers that standardise them: masks prune "
        f"{pruned / size:.0%} of these, and {zero / size:.0%} are zero where the layers compute"
    )
