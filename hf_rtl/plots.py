"""Pictures of masks. Needs matplotlib: `pip install "hf_rtl[plots]"`."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .modeling.files import write_bytes


_MAX_NUMBERED = 12  # most routes for which every cell shows its number
_MAX_NAMED = 60  # most routes for which every row shows its name
_TURNED: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
# Eight colours of Okabe and Ito, then four of Tol, which colour-blind readers can distinguish too.
_COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"),
    *("#332288", "#882255", "#999933", "#661100"),
)
_MARKERS = "os^vD<>PX*ph"
_LINES = ("-", "--")
_LEAST_RANGE = 0.1  # of a scale of similarities: noise stays below it


def similarity_heatmap(
    matrix: Tensor,
    names: Sequence[str],
    file: Path,
    *,
    chance: Tensor | None = None,
    label: str = "Jaccard similarity of two tickets",
) -> None:
    """
    Draws the similarity of every pair of tickets, as a PNG. `file` is never half-written.

    Light is similar and dark is different, in colours that keep their order for colour-blind readers and in grey
    print. The scale goes from chance, at most 0.9, to 1, so a difference looks as large as it is. The diagonal, always
    1, is left white.

    Args:
        matrix (`Tensor`): `[K, K]`, from `MaskBank.similarity()`. NaN, for two empty masks, is left white.
        names (`Sequence[str]`): K names.
        file (`Path`): where to write, such as `similarity.png`.
        chance (`Tensor`, *optional*): `[K, K]`, from `MaskBank.chance_similarity()`; the scale begins at the mean over
            pairs. Without it, it begins at 0.
        label (`str`): what the values are, if not similarities of tickets.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a matrix of another shape.
    """
    num_routes = len(names)
    if matrix.shape != (num_routes, num_routes):
        raise ValueError(
            f"`matrix` has shape {list(matrix.shape)}, which does not fit {num_routes} names: [{num_routes}, "
            f"{num_routes}] is needed, as from `bank.similarity()` and `bank.route_names`."
        )
    from matplotlib.figure import Figure

    values, itself = matrix.detach().cpu().double(), torch.eye(num_routes, dtype=torch.bool)
    of_pairs = values.masked_fill(itself, torch.nan)
    by_chance = 0.0 if chance is None else float(chance.cpu().double().masked_fill(itself, torch.nan).nanmean())
    low = min(1 - _LEAST_RANGE, by_chance)  # `min` takes the first if the other is NaN, as without pairs
    height = 2.2 + 0.42 * min(max(num_routes, 4), 24)
    # Not through pyplot, which keeps figures and chooses a backend.
    figure = Figure(figsize=(height + 1, height), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(of_pairs.numpy(), cmap="cividis", vmin=low, vmax=1)
    ticks = list(range(0, num_routes, -(-num_routes // _MAX_NAMED)))
    labels = [_label(names[index]) for index in ticks]
    size = 9 if num_routes <= 24 else 6
    axes.set_xticks(ticks, labels, fontsize=size, **(_TURNED if max(map(len, labels)) > 3 else {}))
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if num_routes <= _MAX_NUMBERED:
        for row, column in (~values.isnan()).nonzero().tolist():
            value = float(values[row, column])
            red, green, blue, _ = image.cmap((value - low) / (1 - low))
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
    figure.colorbar(image, ax=axes, shrink=0.8).set_label(textwrap.fill(label, 36))
    save_png(figure, file)


def layer_profile(per_layer: Tensor, chance: Tensor, names: Sequence[str], file: Path) -> None:
    """
    Draws the similarity of tickets in each prunable weight, as a PNG: the mean over pairs, the range from the least to
    the most similar pair, and the mean by chance. `file` is never half-written.

    Args:
        per_layer (`Tensor`): `[L, K, K]`, from `MaskBank.similarity(per_layer=True)`. NaN, for two empty masks, is
            left out; where no pair is left, the lines have a gap.
        chance (`Tensor`): `[L, K, K]`, from `MaskBank.chance_similarity(per_layer=True)`.
        names (`Sequence[str]`): L names.
        file (`Path`): where to write, such as `layers.png`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: tensors of another shape, or a single route, which has no pairs.
    """
    num_layers, num_routes = len(names), per_layer.shape[-1]
    for argument, tensor in (("per_layer", per_layer), ("chance", chance)):
        if tensor.shape != (num_layers, num_routes, num_routes):
            raise ValueError(
                f"`{argument}` has shape {list(tensor.shape)}, which does not fit {num_layers} names: [{num_layers}, "
                "K, K] is needed, as from `bank.similarity(per_layer=True)` and `bank.weight_names`."
            )
    if num_routes < 2:
        raise ValueError("there is one route, so there is no pair of tickets to draw.")
    from matplotlib.figure import Figure

    first, second = torch.triu_indices(num_routes, num_routes, offset=1)
    pairs, by_chance = (tensor.detach().cpu().double()[:, first, second] for tensor in (per_layer, chance))
    known = ~pairs.isnan()
    low = torch.where(known, pairs, torch.inf).amin(1).masked_fill(~known.any(1), torch.nan)
    high = torch.where(known, pairs, -torch.inf).amax(1).masked_fill(~known.any(1), torch.nan)
    layers = range(num_layers)
    figure = Figure(figsize=(_width_of_layers(num_layers), 4.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(layers, low, high, color="#9ecae1", linewidth=0, label="from the least to the most alike pair")
    axes.plot(layers, pairs.nanmean(1), color="#08519c", marker="o", markersize=3, label="mean over pairs")
    axes.plot(layers, by_chance.nanmean(1), color="#636363", linestyle="--", label="by chance, at these densities")
    _name_layers(axes, names)
    axes.set_ylabel("Jaccard similarity of two tickets")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    save_png(figure, file)


def layer_densities(density: Tensor, names: Sequence[str], route_names: Sequence[str], file: Path) -> None:
    """
    Draws the density of every ticket in each prunable weight, as a PNG: a line per ticket. The lines of more than
    24 tickets are grey, with their mean in black. `file` is never half-written.

    Args:
        density (`Tensor`): `[L, K]`, from `MaskBank.density(per_layer=True)`.
        names (`Sequence[str]`): L names.
        route_names (`Sequence[str]`): K names.
        file (`Path`): where to write, such as `densities.png`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a tensor of another shape.
    """
    if density.shape != (len(names), len(route_names)):
        raise ValueError(
            f"`density` has shape {list(density.shape)}, which does not fit {len(names)} names and {len(route_names)} "
            "routes, as from `bank.density(per_layer=True)`, `bank.weight_names` and `bank.route_names`."
        )
    from matplotlib.figure import Figure

    values, layers = density.detach().cpu().double(), range(len(names))
    figure = Figure(figsize=(_width_of_layers(len(names)), 4.5), layout="constrained")
    axes = figure.subplots()
    many = len(route_names) > len(_COLOURS) * len(_LINES)
    for route, name in enumerate(route_names):
        style: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 0.8}
        if not many:
            # Tickets may keep equally much: a line in front is thinner than those behind it.
            behind = 1 - (route + 1) / len(route_names)
            style = {
                **line_style(route),
                "label": _label(name),
                "linewidth": 1 + 4 * behind,
                "markersize": 4 + 5 * behind,
            }
        axes.plot(layers, values[:, route], **style)
    if many:
        axes.plot(layers, values.mean(1), color="black", marker="o", markersize=3, label="mean over tickets")
    _name_layers(axes, names)
    axes.set_ylabel("share of the weights that a ticket keeps")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    save_png(figure, file)


def route_curves(
    panels: Sequence[tuple[str, Tensor, Tensor]],
    names: Sequence[str],
    file: Path,
    *,
    chance: tuple[str, Tensor] | None = None,
    marked: Sequence[tuple[int, int]] = (),
) -> None:
    """
    Draws quantities of every route against sparsity, one below the other, as a PNG. `file` is never half-written.
    Twelve routes have colours that colour-blind readers can distinguish, each with its own marker for grey print; the
    lines of twelve more are dashed. If there are still more, all are grey, with their mean in black. A single point is
    no curve, and drawn as a table.

    Args:
        panels: for each quantity its name, the sparsities `[P]`, ascending, and the values `[P, K]`; NaN are left out.
        names (`Sequence[str]`): K names.
        file (`Path`): where to write, such as `curves.png`.
        chance: the name of a panel, and the values `[P]` that are expected by chance there.
        marked: pairs (point, route) that get a ring in the last panel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if len(panels[0][1]) == 1:
        columns = {"route": list(names)}
        for quantity, _, values in panels:
            columns[quantity] = [f"{value:.3f}" for value in values[0].tolist()]
        if chance is not None:
            columns[f"{chance[0]} by chance"] = [f"{float(chance[1]):.3f}"] * len(names)
        return draw_table(columns, file, title=f"sparsity of a ticket: {float(panels[0][1]):.1%}")
    figure = Figure(figsize=(7.5, 1.0 + 2.6 * len(panels)), layout="constrained")
    many = len(names) > len(_COLOURS) * len(_LINES)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (quantity, sparsity, values) in zip(all_axes, panels, strict=True):
        percent = 100 * sparsity
        for route, name in enumerate(names):
            known = ~values[:, route].isnan()
            style = {"color": "#b0b0b0", "linewidth": 0.8}
            if not many:
                style = {**line_style(route), "label": _label(name), "linewidth": 1.3, "markersize": 5}
            axes.plot(percent[known], values[known, route], **style)
        if many:
            axes.plot(percent, values.nanmean(1), color="black", marker="o", markersize=4, label="mean over routes")
        if chance is not None and chance[0] == quantity:
            axes.plot(percent, chance[1], color="black", linestyle=":", linewidth=1.6, label="by chance")
        axes.set_ylabel(quantity)
        axes.grid(linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    for point, route in marked:
        x, y = 100 * panels[-1][1][point], panels[-1][2][point, route]
        all_axes[-1].plot(x, y, marker="o", markersize=13, fillstyle="none", color="black", linestyle="none")
    all_axes[-1].set_xlabel("sparsity of a ticket (%)" + ("; rings: sharp changes" if marked else ""))
    handles = {label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8, handlelength=3
    )
    save_png(figure, file)


def draw_table(columns: Mapping[str, Sequence[str]], file: Path, *, title: str) -> None:
    """Draws a table of texts, title -> cells, as a PNG. `file` is never half-written."""
    from matplotlib.figure import Figure

    cells = {_label(title, limit=40): [_label(cell, limit=40) for cell in column] for title, column in columns.items()}
    widths = [max(map(len, [title, *column])) + 2 for title, column in cells.items()]
    rows = list(zip(*cells.values(), strict=True))
    figure = Figure(figsize=(max(0.09 * sum(widths), 4.0), 0.85 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    places: dict[str, Any] = {"cellLoc": "left", "colLoc": "left", "bbox": (0, 0, 1, 1), "edges": "B"}
    drawn = axes.table(rows, colLabels=list(cells), colWidths=widths, **places)
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    save_png(figure, file)


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a curve by its number. Twelve differ in colour and marker, then dashes differ."""
    line, colour = divmod(number, len(_COLOURS))
    return {"color": _COLOURS[colour], "marker": _MARKERS[colour], "linestyle": _LINES[line % len(_LINES)]}


def save_png(figure: Any, file: Path) -> None:
    """Writes a matplotlib figure whole or not at all; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_bytes(file, buffer.getvalue())


def _width_of_layers(num_layers: int) -> float:
    """Inches of a picture with a tick per layer."""
    return min(max(6.5, 2.0 + 0.25 * num_layers), 16.0)


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """Names the prunable weights below the axis, without what all names begin with; the other goes from 0 to 1."""
    ticks = list(range(0, len(names), -(-len(names) // _MAX_NAMED)))
    shared = os.path.commonprefix(list(names)).rfind(".") + 1
    labels = [_label(names[index][shared:].removesuffix(".weight"), limit=24) for index in ticks]
    axes.set_xticks(ticks, labels, fontsize=7, **_TURNED)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _label(name: str, *, limit: int = 20) -> str:
    """A name for an axis, cut in the middle if it is long. `$` is escaped: matplotlib reads `$x$` as mathematics."""
    if len(name) > limit:
        name = f"{name[: limit // 2]}…{name[1 - limit // 2 :]}"
    return name.replace("$", r"\$")
