"""
The pictures of runs. They need matplotlib (`pip install "hf_rtl[plots]"`), so commands for which pictures are optional
import this module only to draw.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hf_rtl import MaskBank
from hf_rtl.analysis import Change, similarity_by_depth
from hf_rtl.plots import draw_table, line_style, route_curves, save_png, similarity_heatmap

from .points import Point
from .report import cell, over_seeds


# Spectrograms show levels down to this many decibels below the loudest.
_RANGE = 60.0


def draw_rounds(rows: list[dict[str, Any]], similarities: dict[float, float], file: Path) -> None:
    """
    Draws balanced accuracy of every method (of labels, accuracy) and the tickets' mean similarity, against sparsity.
    The tickets' lines come first. A single sparsity gives no curve but a table.
    """
    title = "bal. acc." if "bal. acc." in rows[0] else "accuracy"
    if len(similarities) == 1:
        tickets = {**rows[0], "mean similarity": next(iter(similarities.values()))}
        return _draw_lines([tickets, *rows[1:]], [title, "mean similarity"], file)
    figure = Figure(figsize=(6, 6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    methods = list(dict.fromkeys(line["method"] for line in rows))
    for number, method in enumerate(methods):
        points = [(line["sparsity"], line[title]) for line in rows if line["method"] == method]
        known = [(100 * sparsity, value) for sparsity, value in points if sparsity is not None]
        if known:
            upper.plot(*zip(*known, strict=True), **line_style(number), label=method)
        for sparsity, value in points:
            if sparsity is None:
                upper.axhline(value, linestyle=":", color=line_style(number)["color"], label=method)
    upper.set_ylabel("balanced accuracy" if title == "bal. acc." else "accuracy")
    upper.legend(fontsize="small")
    lower.plot([100 * sparsity for sparsity in similarities], list(similarities.values()), marker="o", color="black")
    lower.set_ylabel("mean Jaccard similarity")
    lower.set_xlabel("sparsity of a ticket (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def draw_losses(losses: Mapping[int, list[tuple[int, float]]], file: Path) -> None:
    """Draws training losses, round -> (step, loss), as a PNG: a line per round, one after the other."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for number, points in enumerate(losses.values()):
        axes.plot(*zip(*points, strict=True), linewidth=0.9, color=line_style(number)["color"])
    axes.set_xlabel("step of joint retraining; a line per round")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    save_png(figure, file)


def draw_methods(tables: Sequence[list[dict[str, Any]]], titles: Sequence[str], file: Path) -> None:
    """
    Draws columns of the tables of several seeds against sparsity, one panel per column: means, with the sample
    standard deviation as bars. A method that is not pruned is a horizontal line. A single sparsity gives no curve
    but a table.
    """
    if len({line["sparsity"] for line in tables[0] if line["sparsity"]}) == 1:
        return _draw_lines(over_seeds(tables), titles, file)
    figure = Figure(figsize=(7, 3 * len(titles)))
    all_axes = figure.subplots(len(titles), 1, sharex=True, squeeze=False)
    methods = list(dict.fromkeys(line["method"] for line in tables[0]))
    for axes, title in zip(all_axes[:, 0], titles, strict=True):
        for number, method in enumerate(methods):
            points: dict[float, list[float]] = {}
            for line in (line for lines in tables for line in lines if line["method"] == method):
                if line.get(title) is not None:
                    points.setdefault(line["sparsity"], []).append(line[title])
            style = {**line_style(number), "label": method, "linewidth": 1.2}
            means = {sparsity: mean(values) for sparsity, values in points.items()}
            if list(means) == [0.0]:
                axes.axhline(means[0.0], **{**style, "linestyle": ":", "marker": ""})
            elif means:
                bars = [stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
                percent = [100 * sparsity + 0.25 * (number - len(methods) / 2) for sparsity in means]
                axes.errorbar(percent, list(means.values()), bars, markersize=5, **style)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    all_axes[-1, 0].set_xlabel("sparsity of a ticket (%)")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 / len(titles)))
    figure.savefig(file, dpi=110)


def _draw_lines(lines: list[dict[str, Any]], titles: Sequence[str], file: Path) -> None:
    """Draws the lines of methods as a table: method, sparsity, and the columns of these titles."""
    columns = {title: [cell(title, line.get(title)) for line in lines] for title in ("method", "sparsity", *titles)}
    draw_table(columns, file, title="one sparsity, so no curves")


def draw_points(
    points: Sequence[Point],
    values: Sequence[np.ndarray],
    changes: Mapping[str, Change],
    metric: str | None,
    bank: MaskBank,
    classes: np.ndarray | None,
    order: Sequence[int],
    folder: Path,
) -> None:
    """
    Draws the masks of a run: `curves.png` of all points, and heatmaps of the similarity of the masks in `bank`, by
    depth, and of the classes.

    Args:
        points: the masks by ascending sparsity.
        values: for every point, the metric of every route, `[K]`, NaN where it was not measured.
        changes: route -> its sharp change, which is marked.
        metric (`str`, *optional*): the name of the metric.
        bank ([`MaskBank`]): the masks of one of the points.
        classes (`np.ndarray`, *optional*): the similarity of the classes, `[K, K]`.
        order: the order of the routes in heatmaps.
        folder (`Path`): the folder of the pictures.
    """
    names = bank.route_names
    sparsity = torch.tensor([point.similarity.sparsity for point in points])
    similarity = torch.tensor(np.stack([point.similarity.similarity for point in points]))
    excess = torch.tensor(np.stack([point.similarity.excess for point in points]))
    panels = [("similarity to others", sparsity, similarity), ("beyond chance", sparsity, excess)]
    if not np.isnan(values).all():
        panels.insert(0, (str(metric).replace("_", " "), sparsity, torch.tensor(np.stack(values))))
    route_curves(
        panels,
        names,
        folder / "curves.png",
        chance=(panels[-2][0], torch.tensor([float(point.similarity.chance.mean()) for point in points])),
        marked=[(change.point, names.index(name)) for name, change in changes.items()],
    )
    ordered = [names[route] for route in order]
    for depth, matrix in similarity_by_depth(bank).items():
        heatmap = torch.tensor(matrix[np.ix_(order, order)])
        file = "similarity.png" if depth == "all" else f"similarity-{depth}.png"
        where = "" if depth == "all" else f", {depth} layers"
        label = f"Jaccard similarity of two tickets{where}"
        # The scale of all layers, so that pictures of different depths can be compared.
        similarity_heatmap(heatmap, ordered, folder / file, chance=bank.chance_similarity(), label=label)
    if classes is not None:
        heatmap = torch.tensor(classes[np.ix_(order, order)])
        similarity_heatmap(heatmap, ordered, folder / "class_similarity.png", label="similarity of two classes")


def draw_reconstructions(rows: Sequence[tuple[str, list[np.ndarray], list[str]]], file: Path) -> None:
    """
    Draws reconstructions of images side by side, as a PNG.

    Args:
        rows: for each row its name, C images `[H, W, 3]` in [0, 1], and a title for each image.
        file (`Path`): the file to write.
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
    Draws the PSNR of every region against its ticket's similarity to the image's other tickets, as a PNG. Regions of
    an image share a colour, and larger regions have larger markers.

    Args:
        reports: the reports of `recipes/inr.py` for RTL at one sparsity, one per image.
        file (`Path`): the file to write.
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


def draw_spectrograms(
    examples: Mapping[str, Tensor], scene_names: Sequence[str], sampling_rate: int, file: Path
) -> None:
    """Draws waveforms `[scenes, samples]` of every kind as a PNG, with a row per scene and a column per kind."""
    num_samples = next(iter(examples.values())).shape[1]
    extent = (0, num_samples / sampling_rate, 0, sampling_rate / 2000)
    figure = Figure(figsize=(2.1 * len(examples) + 1, 1.7 * len(scene_names) + 0.5), layout="constrained")
    axes = figure.subplots(len(scene_names), len(examples), sharex=True, sharey=True, squeeze=False)
    for column, (kind, waveforms) in enumerate(examples.items()):
        for row, scene in enumerate(scene_names):
            levels = _levels(waveforms[row], examples["clean"][row])
            image = axes[row, column].imshow(
                levels, origin="lower", aspect="auto", extent=extent, cmap="cividis", vmin=-_RANGE, vmax=0
            )
            if column == 0:
                axes[row, 0].set_ylabel(f"{scene}\nkHz")
        axes[0, column].set_title(kind, fontsize=10)
        axes[-1, column].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label="dB below the loudest of clean")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=75)
    # Noise compresses badly; 48 colours make the file a third as large.
    Image.open(buffer).convert("RGB").quantize(48).save(file, optimize=True)


def _levels(waveform: Tensor, clean: Tensor) -> Tensor:
    """Levels in dB relative to the loudest of the clean speech, floats `[128 frequencies, frames]`."""
    window = torch.hann_window(256)
    power, of_clean = (
        torch.stft(x, 256, 256, window=window, return_complex=True)[:128].abs().square() for x in (waveform, clean)
    )
    return 10 * (power / of_clean.max()).clamp_min(1e-12).log10()
