"""The results of implicit neural representations: PSNR, and the tables of `recipes/inr.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torchmetrics.functional.image import peak_signal_noise_ratio

from .methods import DENSE, SINGLE, SINGLE_UNION
from .scene_data import Scene


RTL, BALANCED = "RTL", "IMP single, balanced"
# The order of the lines of tables.
METHODS = [RTL, SINGLE, BALANCED, SINGLE_UNION, DENSE]
# A rank correlation within an image needs at least this many regions.
_MIN_REGIONS = 4


def psnr(colours: np.ndarray, target: np.ndarray) -> float:
    """
    The peak signal-to-noise ratio in dB for a peak of 1, from the mean squared error over all pixels and channels.

    Args:
        colours (`np.ndarray`): floats `[N, 3]`, which are clamped to [0, 1] here, as a viewer of the image does.
        target (`np.ndarray`): floats `[N, 3]` in [0, 1].
    """
    pair = (torch.from_numpy(values.astype(np.float64)) for values in (colours, target))
    return float(peak_signal_noise_ratio(*pair, data_range=(0.0, 1.0)))


def figures(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    A line per learning rate, sparsity and method: means over images, with the sample standard deviation for PSNR.
    """
    lines = []
    for (rate, at, method), found in _grouped(reports, lambda r: (r["learning_rate"], r["at"], r["method"])):
        of_images = [mean(report["psnr"] for report in same) for _, same in _grouped(found, lambda r: r["image"])]
        of_regions = [_mean_of_regions(same) for _, same in _grouped(found, lambda r: r["image"])]
        worst = [min(report["psnr_of_regions"].values()) for report in found]
        num_seeds = len({report["seed"] for report in found})
        similarities = [report["mean_similarity"] for report in found if report["mean_similarity"] is not None]
        lines.append(
            {
                "method": method,
                "sparsity": at,
                "learning rate": f"{rate:g}",
                "PSNR (dB)": _with_spread(of_images),
                "mean of regions (dB)": _with_spread(of_regions),
                "worst region (dB)": f"{mean(worst):.2f}",
                "weights": round(mean(report["union"] for report in found)),
                "bytes of weights and masks": round(mean(report["weight_bytes"] for report in found)),
                "of the region map": round(mean(report["side_bytes"] for report in found)),
                "together": round(mean(report["weight_bytes"] + report["side_bytes"] for report in found)),
                "mean Jaccard": mean(similarities) if method == RTL and similarities else None,
                "emptied layers (worst)": max(
                    len(layers) for report in found for layers in [[], *report["emptied_layers"].values()]
                ),
                "regions of one colour": round(sum(report["constant_tickets"] for report in found) / num_seeds),
            }
        )
    return sorted(
        lines, key=lambda line: (-float(line["learning rate"]), line["sparsity"] or 0, METHODS.index(line["method"]))
    )


def differences(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the tickets' PSNR minus that of each other method, by image, with the same learning rate."""
    psnrs = {
        key: (mean(report["psnr"] for report in same), _mean_of_regions(same))
        for key, same in _grouped(reports, lambda r: (r["learning_rate"], r["method"], r["at"], r["image"]))
    }
    lines = []
    for rate, at in dict.fromkeys((rate, at) for rate, method, at, _ in psnrs if method == RTL):
        for other in METHODS[1:]:
            at_other = None if other == DENSE else at
            pairs = [
                (psnrs[rate, RTL, at, image], psnrs[rate, other, at_other, image])
                for image in dict.fromkeys(image for *_, image in psnrs)
                if (rate, other, at_other, image) in psnrs
            ]
            if pairs:
                gains, of_regions = ([rtl[kind] - single[kind] for rtl, single in pairs] for kind in (0, 1))
                lines.append(
                    {
                        "learning rate": f"{rate:g}",
                        "sparsity": at,
                        "RTL minus": other,
                        "dB": _with_spread(gains),
                        "least": f"{min(gains):.2f}",
                        "most": f"{max(gains):.2f}",
                        "images where RTL is better": f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
                        "dB, mean of regions": _with_spread(of_regions),
                        "better images so": f"{sum(gain > 0 for gain in of_regions)} of {len(gains)}",
                    }
                )
    return lines


def images(scenes: Sequence[Scene], reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per image, with the PSNR of every method at the first learning rate."""
    lines = []
    for scene in scenes:
        height, width = scene.regions.shape
        line: dict[str, Any] = {"image": scene.name, "size": f"{width}×{height}", "regions": len(scene.region_names)}
        own = [
            report
            for report in reports
            if report["image"] == scene.name
            and report["learning_rate"] == reports[0]["learning_rate"]
            and report["method"] not in (BALANCED, SINGLE_UNION)
        ]
        for (method, at), same in _grouped(own, lambda report: (report["method"], report["at"])):
            title = method if at is None else f"{method} {at:.0%}"
            line[title] = f"{mean(report['psnr'] for report in same):.2f}"
        lines.append(line)
    return lines


def correlations(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Spearman's rank correlations over regions, by learning rate and sparsity: of a region's PSNR with its ticket's mean
    similarity to the image's other tickets, over all regions and within images; and of both with the region's size.
    """
    lines = []
    tickets = [report for report in reports if report["method"] == RTL and len(report["psnr_of_regions"]) > 1]
    for (rate, at), found in _grouped(tickets, lambda report: (report["learning_rate"], report["at"])):
        psnrs = [list(report["psnr_of_regions"].values()) for report in found]
        similarities = [report["similarity_of_regions"] for report in found]
        sizes = [report["pixels_of_regions"] for report in found]
        within = [
            float(spearmanr(one, other).statistic)
            for one, other in zip(psnrs, similarities, strict=True)
            if len(one) >= _MIN_REGIONS
        ]
        spread = f"{mean(within):.3f} ({min(within):.3f} to {max(within):.3f})" if within else None
        all_psnrs, all_similarities, all_sizes = (np.concatenate(parts) for parts in (psnrs, similarities, sizes))
        lines.append(
            {
                "learning rate": f"{rate:g}",
                "sparsity": at,
                "regions": len(all_psnrs),
                "PSNR with similarity": float(spearmanr(all_psnrs, all_similarities).statistic),
                "within images, mean (range)": spread,
                "such images": len(within),
                "PSNR with size": float(spearmanr(all_psnrs, all_sizes).statistic),
                "similarity with size": float(spearmanr(all_similarities, all_sizes).statistic),
            }
        )
    return lines


def _grouped(lines: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The lines of each key, in the order of the keys' first lines."""
    groups: dict[Any, list[Any]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return list(groups.items())


def _mean_of_regions(reports: Sequence[dict[str, Any]]) -> float:
    """The mean PSNR over regions, without weighting by size, and over reports."""
    return mean(mean(report["psnr_of_regions"].values()) for report in reports)


def _with_spread(values: Sequence[float]) -> str:
    """The mean as text, with ± the sample standard deviation if there are several values."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
