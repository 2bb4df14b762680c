"""Pictures of `recipes/inr.py`: what networks make of an image, and how alike tickets are that represent it well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_rtl.plots import save_png


def draw_reconstructions(rows: Sequence[tuple[str, list[np.ndarray], list[str]]], file: Path) -> None:
    """
    Draws images side by side as a PNG.

    Args:
        rows: of each its name, C images `[H, W, 3]` in [0, 1], and a title for each image.
        file (`Path`): where to.
    """
    columns = len(rows[0][1])
    heights = [images[0].shape[0] / images[0].shape[1] for _, images, _ in rows]
    figure = Figure(figsize=(1.3 * columns, sum(1.3 * height + 0.3 for height in heights)), layout="constrained")
    all_axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, (name, images, titles) in zip(all_axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=7)
        for axes, image, title in zip(row, images, titles, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, fontsize=7, pad=2)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    save_png(figure, file)


def draw_scatter(reports: Sequence[dict[str, Any]], file: Path) -> None:
    """
    Draws PSNR of every region against the similarity of its ticket to the others of its image, as a PNG. Regions of
    an image share a colour, and larger regions are larger.

    Args:
        reports: of RTL at one sparsity, one per image, as of `recipes/inr.py`.
        file (`Path`): where to.
    """
    figure = Figure(figsize=(5.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, report in enumerate(reports):
        sizes = 10 + 200 * np.array(report["pixels_of_regions"]) / sum(report["pixels_of_regions"])
        shade = [number / max(1, len(reports) - 1)] * len(sizes)
        axes.scatter(
            report["similarity_of_regions"],
            list(report["psnr_of_regions"].values()),
            s=sizes,
            c=shade,
            cmap="cividis",
            vmin=0,
            vmax=1,
            marker="os^vD<>P"[number % 8],
            edgecolors="black",
            linewidths=0.4,
        )
    axes.set_xlabel(f"mean Jaccard similarity to the image's other tickets, {reports[0]['at']:.0%} sparsity")
    axes.set_ylabel("PSNR of the region (dB)")
    axes.grid(linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, file)
