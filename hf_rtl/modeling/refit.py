"""A closed-form refit: what is left of a layer takes over what the removed units gave, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .layer_inputs import LayerInputs
from .units import UnitLayer


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
    gather: Callable[[list[tuple[Tensor, Tensor, int]]], list[tuple[Tensor, Tensor, int]]] = lambda sums: sums,
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
        gather (`Callable`, *optional*): turns the sums of this process's batches into those of all batches.

    Raises:
        ValueError: inputs that are not finite, or none.
    """
    for layer, mask in zip(layers, kept, strict=True):
        if mask.all() or not can_refit(network, layer):
            continue
        ((name, dim),) = layer.readers
        sums = gather(_second_moments(network, name, batches()))
        if not sums:
            raise ValueError("`refit` needs at least one batch, got none.")
        products, totals = torch.stack([one for one, _, _ in sums]).sum(0), torch.stack([one for _, one, _ in sums])
        count = sum(count for _, _, count in sums)
        weight = network.get_parameter(name)
        bias = getattr(network.get_submodule(name.rpartition(".")[0]), "bias", None)
        units = layer.places[name, dim]
        solved, offset = solve(
            weight.movedim(dim, -1).double(),
            units[mask].flatten().to(weight.device),
            products,
            totals.sum(0) / count,
            count,
            ridge=ridge,
            centred=bias is not None,
        )
        if not solved.isfinite().all():
            raise ValueError(f"the inputs of {name} are not finite, so that it cannot be refitted.")
        weight.copy_(solved.movedim(-1, dim))
        if bias is not None:
            bias.add_(offset.to(bias))


def solve(
    weight: Tensor, kept: Tensor, products: Tensor, mean: Tensor, count: int, *, ridge: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """
    The least-squares problem of one layer.

    Args:
        weight (`Tensor`): `float64 [outputs, inputs]`.
        kept (`Tensor`): the inputs that are kept, `int64`.
        products (`Tensor`), mean (`Tensor`), count (`int`): HᵀH `[inputs, inputs]`, the mean of H, and its rows.
        ridge (`float`): λ over the mean diagonal.
        centred (`bool`): whether the layer has a bias, which takes up means.

    Returns:
        The new weight, zero for inputs that are not kept, and what is added to the bias.
    """
    if centred:
        products = products - count * torch.outer(mean, mean)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
    own = products[kept][:, kept]
    scale = float(own.diagonal().mean())
    system = own + ridge * (scale or 1.0) * torch.eye(len(kept), dtype=own.dtype, device=own.device)
    change = torch.linalg.solve(system, products[kept][:, removed] @ weight[:, removed].T).T
    solved = torch.zeros_like(weight)
    solved[:, kept] = weight[:, kept] + change
    return solved, (weight - solved) @ mean


def _second_moments(
    network: nn.Module, name: str, batches: Iterable[Mapping[str, Any]]
) -> list[tuple[Tensor, Tensor, int]]:
    """For each batch the sum of hᵀh, of h, and the number of rows, of what the layer of the weight `name` is given."""
    sums: list[tuple[Tensor, Tensor, int]] = []
    calls: list[Tensor] = []

    def finish() -> None:
        rows = torch.cat(calls).double()
        sums.append((rows.T @ rows, rows.sum(0), len(rows)))
        calls.clear()

    LayerInputs(network, [name], lambda _, x: calls.append(x)).run(batches, finish)
    return sums
