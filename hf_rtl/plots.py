"""Pictures of a model's masks. Needs matplotlib: `pip install "hf_rtl[plots]"`."""

from __future__ import annotations

import io
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
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if num_routes <= _MAX_NUMBERED:
        for row, column in (~values.isnan()).nonzero().tolist():
            value = float(values[row, column])
            red, green, blue, _ = image.cmap((value - low) / (high - low))
            is_dark = row != column and 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
            axes.text(
                column,
                row,
                "1" if row == column else f"{value:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if is_dark else "black",
            )
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("Jaccard similarity of two tickets")
    save_png(figure, file)


def save_png(figure: Any, file: Path) -> None:
    """Writes a matplotlib figure whole or not at all; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_bytes(file, buffer.getvalue())


def _label(name: str) -> str:
    """A name for an axis: cut if it is long, and as it is, since matplotlib reads `$x$` as mathematics."""
    return (name if len(name) <= 20 else f"{name[:19]}…").replace("$", r"\$")
