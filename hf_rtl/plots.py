"""Pictures of a model's masks. Needs matplotlib: `pip install "hf_rtl[plots]"`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_bytes


_MAX_NUMBERED = 12  # routes up to which every cell has its number
_MAX_NAMED = 60  # routes up to which every row has its name


def similarity_heatmap(matrix: Tensor, names: Sequence[str], file: Path) -> None:
    """
    Draws how alike tickets are, pair by pair, as a PNG. `file` is either as it was or whole.

    Light is alike and dark is different, in colours that keep their order for colour-blind readers and in grey print.
    The scale spans the values of pairs; a ticket with itself, always 1, is left white.

    Args:
        matrix (`Tensor`): `[K, K]`, as of `MaskBank.similarity()`. NaN, of two empty masks, is left white.
        names (`Sequence[str]`): K names.
        file (`Path`): where to, as `similarity.png`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a matrix of another shape.
    """
    num_routes = len(names)
    if matrix.shape != (num_routes, num_routes):
        raise ValueError(
            f"`matrix` has shape {list(matrix.shape)}, which does not fit {num_routes} names: [{num_routes}, "
            f"{num_routes}] is needed, as `bank.similarity()` and `bank.route_names` are."
        )
    from matplotlib.figure import Figure

    values = matrix.detach().cpu().double()
    of_pairs = values.masked_fill(torch.eye(num_routes, dtype=torch.bool), torch.nan)
    known = of_pairs[~of_pairs.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if low == high:
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    height = 2.2 + 0.42 * min(max(num_routes, 4), 24)
    # Not through pyplot, which keeps figures and chooses a backend.
    figure = Figure(figsize=(height + 1, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(of_pairs.numpy(), cmap="cividis", vmin=low, vmax=high)
    ticks = list(range(0, num_routes, -(-num_routes // _MAX_NAMED)))
    labels = [_label(names[index]) for index in ticks]
    size = 9 if num_routes <= 24 else 6
    axes.set_xticks(ticks, labels, fontsize=size)
    if max(map(len, labels)) > 3:
        axes.tick_params("x", rotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if num_routes <= _MAX_NUMBERED:
        digits = 2 if high - low >= 0.1 else 3
        for row, column in (~values.isnan()).nonzero().tolist():
            value = float(values[row, column])
            red, green, blue, _ = image.cmap((value - low) / (high - low))
            is_dark = row != column and 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
            axes.text(
                column,
                row,
                "1" if row == column else f"{value:.{digits}f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if is_dark else "black",
            )
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("Jaccard similarity of two tickets")
    save_png(figure, file)


def layer_profile(per_layer: Tensor, chance: Tensor, names: Sequence[str], file: Path) -> None:
    """
    Draws how alike tickets are in each prunable weight, as a PNG: the mean over pairs, the range from the least to the
    most alike pair, and what is so by chance. `file` is either as it was or whole.

    Args:
        per_layer (`Tensor`): `[L, K, K]`, as of `MaskBank.similarity(per_layer=True)`. NaN, of two empty masks, counts
            for nothing; where there is no other pair, the lines have a gap.
        chance (`Tensor`): `[L, K, K]`, as of `MaskBank.chance_similarity(per_layer=True)`.
        names (`Sequence[str]`): L names.
        file (`Path`): where to, as `layers.png`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: tensors of another shape, or a single route, which has no pairs.
    """
    num_layers, num_routes = len(names), per_layer.shape[-1]
    for argument, tensor in (("per_layer", per_layer), ("chance", chance)):
        if tensor.shape != (num_layers, num_routes, num_routes):
            raise ValueError(
                f"`{argument}` has shape {list(tensor.shape)}, which does not fit {num_layers} names: [{num_layers}, "
                "K, K] is needed, as `bank.similarity(per_layer=True)` and `bank.weight_names` are."
            )
    if num_routes < 2:
        raise ValueError("there is one route, and no pair of tickets to draw.")
    from matplotlib.figure import Figure

    first, second = torch.triu_indices(num_routes, num_routes, offset=1)
    pairs, by_chance = (tensor.detach().cpu().double()[:, first, second] for tensor in (per_layer, chance))
    known = ~pairs.isnan()
    low = torch.where(known, pairs, torch.inf).amin(1).masked_fill(~known.any(1), torch.nan)
    high = torch.where(known, pairs, -torch.inf).amax(1).masked_fill(~known.any(1), torch.nan)
    layers = range(num_layers)
    figure = Figure(figsize=(min(max(6.5, 2.0 + 0.25 * num_layers), 16.0), 4.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(layers, low, high, color="#9ecae1", linewidth=0, label="from the least to the most alike pair")
    axes.plot(layers, pairs.nanmean(1), color="#08519c", marker="o", markersize=3, label="mean over pairs")
    axes.plot(layers, by_chance.nanmean(1), color="#636363", linestyle="--", label="by chance, at these densities")
    ticks = list(range(0, num_layers, -(-num_layers // _MAX_NAMED)))
    shared = os.path.commonprefix(list(names)).rfind(".") + 1
    labels = [_layer_label(names[index][shared:]) for index in ticks]
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("Jaccard similarity of two tickets")
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    save_png(figure, file)


def save_png(figure: Any, file: Path) -> None:
    """Writes a matplotlib figure whole or not at all; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_bytes(file, buffer.getvalue())


def _layer_label(name: str) -> str:
    """The end of a long name, which tells weights apart; all of them are called `weight`."""
    name = name.removesuffix(".weight")
    return (name if len(name) <= 24 else f"…{name[-23:]}").replace("$", r"\$")


def _label(name: str) -> str:
    """A name for an axis: cut if it is long, and as it is, since matplotlib reads `$x$` as mathematics."""
    return (name if len(name) <= 20 else f"{name[:19]}…").replace("$", r"\$")
