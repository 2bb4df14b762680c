"""How active the inputs of layers are on the data of each route: sums of squares over samples and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.modules.conv import _ConvNd

from ..modeling.experts import ExpertInputs
from ..modeling.layer_inputs import LayerInputs


# Name of a weight -> sum of squares of its layer's inputs, float64, and the number of positions.
Sums = dict[str, tuple[Tensor, int]]


def input_squares(
    network: nn.Module, weight_names: Sequence[str], batches: Iterable[Mapping[str, Any]], *, per_weight: bool
) -> list[Sums]:
    """
    Sums of the squared inputs of layers, for each batch by itself, in one sweep for all layers.

    Args:
        network (`nn.Module`): see [`LayerInputs`].
        weight_names (`Sequence[str]`): the weights whose layers are measured.
        batches (`Iterable`): arguments of a forward, on the device.
        per_weight (`bool`): whether a convolution has a sum for each element of its kernel, `[channels, *kernel]`,
            over the positions that this element multiplies, in place of one for each channel.

    Returns:
        For each batch: name of a weight -> the sum, `float64 [channels]`, and the number of positions. Fused experts
        have sums over the positions that each expert gets, `[experts, channels]`, and the number of all positions.
    """
    found: list[Sums] = []
    current: Sums = {}

    def receive(name: str, x: Tensor | ExpertInputs) -> None:
        module = network.get_submodule(name.rpartition(".")[0])
        total, count = current.get(name, (0, 0))
        if isinstance(x, ExpertInputs):
            count += x.num_positions
            total = total + torch.stack([part.double().square().sum(0) for part in x.parts])
        elif isinstance(module, _ConvNd):
            squares = x.double().square()
            count += squares[:, 0].numel()
            total = total + (
                _per_kernel(squares.sum(0), module) if per_weight else squares.transpose(0, 1).flatten(1).sum(1)
            )
        else:
            count += len(x)
            total = total + x.double().square().sum(0)
        current[name] = total, count

    def finish() -> None:
        found.append({name: (total.cpu(), count) for name, (total, count) in current.items()})
        current.clear()

    LayerInputs(network, weight_names, receive).run(batches, finish)
    return found


def _per_kernel(squares: Tensor, module: Any) -> Tensor:
    """Sums of `squares`, `[channels, …]`, over the positions that each element of a kernel multiplies."""
    sides = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = pad(squares[None], sides, mode=mode)
    one = squares.ndim == 2
    if squares.ndim > 3:
        raise ValueError("activity of single weights is not measured for convolutions of three dimensions.")
    if one:
        padded = padded[:, :, None]
    options = [(1, *option) if one else option for option in (module.kernel_size, module.dilation, module.stride)]
    windows = unfold(padded, options[0], dilation=options[1], stride=options[2]).sum(2)
    return windows.view(len(squares), *module.kernel_size)


def add_up(sums: Sequence[Sums]) -> Sums:
    """The sums of all batches, added in their order."""
    total = dict(sums[0])
    for other in sums[1:]:
        for name, (squares, count) in other.items():
            total[name] = (total[name][0] + squares, total[name][1] + count)
    return total
