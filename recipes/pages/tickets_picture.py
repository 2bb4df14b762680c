"""
Draws docs/tickets.png, the picture of the start pages: three groups of inputs, a ticket for each, one set of weights.

    PYTHONPATH=recipes python -m pages.tickets_picture

The digits are scikit-learn's. The masks are drawn at random, half of 64 weights each: a sketch, not a measurement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from sklearn.datasets import load_digits

from hf_rtl.plots import save_png


FILE = Path(__file__).parents[2] / "docs" / "tickets.png"
SIDE = 8  # weights in a row of the grids
KEPT = "#0072b2"
NUM_TICKETS_COLOURS = ("#ffffff", "#c6dbef", "#6baed6", "#08519c")  # of a weight that 0, 1, 2, 3 tickets keep
EDGE = {"edgecolor": "#7f7f7f", "linewidth": 0.6}
ARROW = {"color": "#404040", "linewidth": 1.2, "mutation_scale": 12}


def main() -> None:
    hospitals, masks = inputs(), tickets(seed=1)
    figure = Figure(figsize=(7.5, 4.1))
    figure.text(0.13, 0.93, "three groups of inputs", ha="center", fontsize=11)
    figure.text(0.46, 0.93, "a ticket for each:\nthe weights that it uses", ha="center", va="center", fontsize=11)
    figure.text(0.82, 0.93, "one set of weights,\nstored once", ha="center", va="center", fontsize=11)
    whole = figure.add_axes((0.665, 0.24, 0.31, 0.31 * 7.5 / 4.1))
    draw_grid(whole, [[NUM_TICKETS_COLOURS[number] for number in row] for row in masks.sum(0)])
    for place, (name, image) in enumerate(hospitals.items()):
        bottom = 0.61 - 0.29 * place
        axes = figure.add_axes((0.06, bottom, 0.14, 0.14 * 7.5 / 4.1))
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, fontsize=10)
        ticket = figure.add_axes((0.39, bottom, 0.14, 0.14 * 7.5 / 4.1))
        draw_grid(ticket, [[KEPT if kept else "#ffffff" for kept in row] for row in masks[place]])
        connect(figure, axes, (1.06, 0.5), ticket, (-0.06, 0.5), arrowstyle="-|>")
        connect(figure, ticket, (1.06, 0.5), whole, (-0.03, 0.5 + 0.35 * (1 - place)), linestyle="--")
    draw_legend(figure)
    save_png(figure, FILE)


def inputs() -> dict[str, np.ndarray]:
    """A digit as three hospitals scan it: as it is, inverted, and turned."""
    image = load_digits().images[3] / 16
    return {"north": image, "south": 1 - image, "west": np.rot90(image)}


def tickets(*, seed: int) -> np.ndarray:
    """Three masks `bool [3, side, side]` that keep half of the weights, in part the same ones."""
    generator = np.random.default_rng(seed)
    scores = generator.random((SIDE, SIDE)) + generator.random((3, SIDE, SIDE))
    return scores > np.median(scores, axis=(1, 2), keepdims=True)


def draw_grid(axes: Any, colours: list[list[str]]) -> None:
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, clip_on=False, **EDGE))
    axes.set_xlim(0, SIDE)
    axes.set_ylim(SIDE, 0)
    axes.set_axis_off()


def connect(
    figure: Figure, start: Any, here: tuple[float, float], end: Any, there: tuple[float, float], **style: Any
) -> None:
    """A line from a place of one part of the picture to a place of another, both as fractions of the part."""
    places = {"coordsA": start.transAxes, "coordsB": end.transAxes}
    figure.add_artist(ConnectionPatch(here, there, **places, **ARROW, **style))


def draw_legend(figure: Figure) -> None:
    axes = figure.add_axes((0.665, 0.06, 0.31, 0.1))
    axes.set_xlim(0, 4)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    for number, colour in enumerate(NUM_TICKETS_COLOURS):
        axes.add_patch(Rectangle((number + 0.2, 0.55), 0.28, 0.4, facecolor=colour, clip_on=False, **EDGE))
        axes.text(number + 0.58, 0.75, str(number), va="center", fontsize=10)
    axes.text(2, 0.2, "tickets use the weight", ha="center", va="center", fontsize=10)


if __name__ == "__main__":
    main()
