"""A closed-form refit: what is left of a layer takes over what the removed units gave, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .layer_inputs import LayerInputs
from .units import UnitLayer


# With H the inputs of a layer and H_K those that are kept: H_KᵀH, the sum of H's rows, float64, and their number.
Moments = tuple[Tensor, Tensor, int]


def can_refit(network: nn.Module, layer: UnitLayer) -> bool:
    """Whether a single layer's matrix reads the units; what others read keeps its weights in a refit."""
    modules = [network.get_submodule(name.rpartition(".")[0]) for name, _ in layer.readers]
    return len(modules) == 1 and not isinstance(modules[0], _ConvNd) and layer.expert is None


@torch.no_grad()
def refit(
    network: nn.Module,
    layers: Iterable[UnitLayer],
    kept: Iterable[Tensor],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    *,
    ridge: float = 1e-2,
    gather: Callable[[list[Moments]], list[Moments]] | None = None,
) -> None:
    """
    Solves, in place and layer after layer, the ridge least-squares problem of the weights that read units, so that the
    units that are kept give what all units gave. Each layer is solved on what the layers before it give after theirs.

    With H the inputs of a reader, centred if it has a bias, K the kept units and R the removed ones, the weights of
    the kept units change by ΔW = ((H_Kᵀ H_K + λI)⁻¹ H_Kᵀ H_R W_Rᵀ)ᵀ, where λ is `ridge` times the mean diagonal of
    H_Kᵀ H_K, and the bias so that the mean output stays. Weights of removed units become zero. Sums and solution are
    float64.

    Args:
        network (`nn.Module`): the network; removed units still compute in it.
        layers, kept: layers of units in the order of the forward, and the units that are kept, `bool`. What a
            convolution, fused experts or several layers read is left as it is.
        batches (`Callable`): makes the batches, the same at every call; arguments of a forward, on the device.
        ridge (`float`, defaults to 0.01): λ over the mean diagonal; larger for fewer samples.
        gather (`Callable`, *optional*): turns the sums of each of this process's batches into those of all batches.

    Raises:
        ValueError: inputs that are not finite, or none.
    """
    for layer, mask in zip(layers, kept, strict=True):
        if mask.all() or not can_refit(network, layer):
            continue
        ((name, dim),) = layer.readers
        weight = network.get_parameter(name)
        inputs = layer.places[name, dim][mask].flatten().to(weight.device)
        moments = _moments(network, name, inputs, batches(), gather)
        if moments is None:
            raise ValueError("`refit` needs at least one batch, got none.")
        bias = getattr(network.get_submodule(name.rpartition(".")[0]), "bias", None)
        solved, offset = solve(
            weight.movedim(dim, -1).double(), inputs, *moments, ridge=ridge, centred=bias is not None
        )
        if not solved.isfinite().all():
            raise ValueError(f"the inputs of {name} are not finite, so that it cannot be refitted.")
        weight.copy_(solved.movedim(-1, dim))
        if bias is not None:
            bias.add_(offset.to(bias))


@torch.no_grad()
def without_refit(network: nn.Module, layers: Iterable[UnitLayer], kept: Iterable[Tensor]) -> None:
    """Makes zero, in place, what reads removed units in the layers that [`refit`] would solve."""
    for layer, mask in zip(layers, kept, strict=True):
        for name, dim in layer.readers if can_refit(network, layer) else ():
            weight = network.get_parameter(name)
            weight.index_fill_(dim, layer.places[name, dim][~mask].flatten().to(weight.device), 0)


def solve(
    weight: Tensor, kept: Tensor, products: Tensor, total: Tensor, count: int, *, ridge: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """
    The least-squares problem of one layer.

    Args:
        weight (`Tensor`): `float64 [outputs, inputs]`.
        kept (`Tensor`): the inputs that are kept, `int64`.
        products (`Tensor`), total (`Tensor`), count (`int`): H_KᵀH `[num_kept, inputs]`, the sum of the rows of H, and
            their number.
        ridge (`float`): λ over the mean diagonal.
        centred (`bool`): whether the layer has a bias, which takes up means.

    Returns:
        The new weight, zero for inputs that are not kept, and what is added to the bias.
    """
    mean = total / count
    if centred:
        products = products - count * torch.outer(mean[kept], mean)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
    own = products[:, kept]
    scale = float(own.diagonal().mean())
    system = own + ridge * (scale or 1.0) * torch.eye(len(kept), dtype=own.dtype, device=own.device)
    change = torch.linalg.solve(system, products[:, removed] @ weight[:, removed].T).T
    solved = torch.zeros_like(weight)
    solved[:, kept] = weight[:, kept] + change
    return solved, (weight - solved) @ mean


def _moments(
    network: nn.Module,
    name: str,
    kept: Tensor,
    batches: Iterable[Mapping[str, Any]],
    gather: Callable[[list[Moments]], list[Moments]] | None,
) -> Moments | None:
    """The moments of what the layer of the weight `name` is given, over all batches; `None` if there are none."""
    sums: list[Moments] = []
    calls: list[Tensor] = []
    num_calls = 0

    def receive(_: str, x: Tensor) -> None:
        calls.append(x)
        if len(calls) == num_calls:  # all that follows in the network is of no use here
            inputs.stop()

    def finish() -> None:
        nonlocal num_calls
        num_calls = len(calls)
        rows = torch.cat(calls).double()
        calls.clear()
        sums.append((rows[:, kept].T @ rows, rows.sum(0), len(rows)))
        if gather is None:
            sums[:] = [reduce(_add, sums)]

    inputs = LayerInputs(network, [name], receive)
    inputs.run(batches, finish)
    found = sums if gather is None else gather(sums)
    return reduce(_add, found) if found else None


def _add(one: Moments, other: Moments) -> Moments:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
