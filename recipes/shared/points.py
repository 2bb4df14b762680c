"""The masks of a run at every sparsity that it reached: reading them from its folder, and analysing them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from hf_rtl import MaskBank, RTLModel
from hf_rtl.analysis import TicketSimilarity, semantic_alignment, similarity_by_depth, spearman, ticket_similarity
from hf_rtl.training.run_directory import REPORT_FILE, RunDirectory


@dataclass
class Point:
    """Masks at one sparsity, and the report of their round if they were retrained and evaluated."""

    name: str
    bank: MaskBank
    similarity: TicketSimilarity
    report: dict[str, Any] | None


def points_of_run(run: Path, extraction_dir: Path | None) -> list[Point]:
    """
    The masks after every prune event that all routes have finished; if the folder has no events, those of its rounds.

    Raises:
        ValueError: there are no masks.
    """
    configuration = json.loads((run / "run.json").read_text())["configuration"]
    directory = RunDirectory(run, extraction_dir)
    files = [directory.read_report(file.parent) for file in sorted(run.glob(f"round-*/{REPORT_FILE}"))]
    reports = {report["mask_fingerprint"]: report for report in files if report is not None}
    points = []
    for event in range(len(list(directory.extraction_path.glob("event-*")))):
        bank = MaskBank([tuple(weight) for weight in configuration["prunable"]], configuration["model"]["route_names"])
        masks = [directory.load_mask(event, route, bank) for route in range(bank.num_routes)]
        found = [mask for mask in masks if mask is not None]
        if len(found) < bank.num_routes:  # The run has not finished this event.
            break
        for route, mask in enumerate(found):
            bank.set_packed(route, mask)
        report = reports.get(bank.fingerprint())
        name = report["folder"] if report is not None else f"event {event + 1}"
        points.append(Point(name, bank, ticket_similarity(bank), report))
    if not points and reports:
        return points_of_models([run / report["folder"] for report in reports.values()])
    if not points:
        raise ValueError(f"{str(run)!r} has no masks yet; if they are elsewhere, give --extraction_dir.")
    return points


def points_of_models(folders: Sequence[Path]) -> list[Point]:
    """The masks of saved models, by ascending sparsity. Raises `ValueError` if two models are equally sparse."""
    points = []
    for folder in folders:
        bank = RTLModel.from_pretrained(folder).mask_bank
        report = RunDirectory(folder.parent).read_report(folder)
        points.append(Point(folder.name, bank, ticket_similarity(bank), report))
    points.sort(key=lambda point: point.similarity.sparsity)
    for before, after in zip(points, points[1:], strict=False):
        if before.similarity.sparsity == after.similarity.sparsity:
            raise ValueError(f"{before.name!r} and {after.name!r} are equally sparse; give one of them.")
    return points


def choose_metric(points: Sequence[Point], names: Sequence[str]) -> str | None:
    """The name of the metric that the reports have for every route; `None` if they have neither."""
    reports = [point.report for point in points if point.report is not None]
    for metric in ("balanced_accuracy", "accuracy"):
        if any(f"eval_{names[0]}/{metric}" in report["metrics"] for report in reports):
            return metric
    return None


def route_values(point: Point, metric: str | None) -> np.ndarray:
    """The metric of every route, `[K]`; NaN where it was not measured."""
    metrics = {} if point.report is None else point.report["metrics"]
    return np.array([metrics.get(f"eval_{name}/{metric}", math.nan) for name in point.bank.route_names])


def point_line(point: Point, values: np.ndarray) -> dict[str, Any]:
    """The line of a point in tables. `values`: the metric of every route, `[K]`, NaN where it was not measured."""
    similarity = point.similarity
    measured = not np.isnan(values).all()
    rho = math.nan if np.isnan(values).any() else float(spearman(values, similarity.similarity))
    return {
        "masks": point.name,
        "sparsity": similarity.sparsity,
        "similarity": float(similarity.similarity.mean()),
        "chance": float(similarity.chance.mean()),
        "uniform chance": float(similarity.uniform_chance.mean()),
        "excess": float(similarity.excess.mean()),
        "emptied": sum(map(len, similarity.emptied_layers.values())),
        "accuracy": float(np.nanmean(values)) if measured else None,
        "its correlation with similarity": None if math.isnan(rho) else rho,
    }


def alignment(bank: MaskBank, classes: np.ndarray, num_permutations: int, seed: int) -> dict[str, dict[str, Any]]:
    """The alignment of the similarity of tickets with that of their classes, `[K, K]`, by depth."""
    return {
        depth: asdict(semantic_alignment(similarity, classes, num_permutations=num_permutations, seed=seed))
        for depth, similarity in similarity_by_depth(bank).items()
    }


def ordering(similarity: np.ndarray) -> list[int]:
    """An order of routes with similar ones side by side: the leaves of average linkage, in their optimal order."""
    if len(similarity) < 3:
        return list(range(len(similarity)))
    distances = squareform(np.nan_to_num(similarity.max() - similarity) * (1 - np.eye(len(similarity))), checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances)).tolist()
