"""
Show how alike the tickets of a run are as they grow sparser, whether they collapse, and whether they follow the
meaning of their classes. Reads masks and reports; trains and evaluates nothing.

    python recipes/analyze.py runs/digits
    python recipes/analyze.py runs/cifar10 --class_similarity similarity.csv
    python recipes/analyze.py runs/cifar10 --class_similarity /usr/share/wordnet      # apt-get install wordnet-base
    python recipes/analyze.py model-at-50 model-at-75 model-at-90 --output_dir analysis

Of a run all prune events are looked at, of which each round's last is retrained; of saved models these alone.

Columns. similarity: mean Jaccard similarity to the other tickets. chance: what random masks with the same densities
in every layer have; uniform chance: with the same density over all layers. excess: similarity - chance; only this
says that tickets share more than their density. emptied: layers in which a ticket keeps nothing, over all tickets.

Verdict. A sharp change of a route's excess against its earlier trend, up or down, is a warning that tickets collapse,
which needs no labels. It takes five points; what is sharp is fixed in hf_rtl.analysis.detect_change.

Alignment. Spearman's correlation between the similarities of tickets and those of their classes, over pairs of routes,
in all layers and in the shallow, middle and deep third, with the p-value of a Mantel test. With WordNet, names of
routes must be nouns; else give a csv file with the names in its first row and column.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_rtl import MaskBank, RTLModel
from hf_rtl.analysis import (
    LEAST_POINTS,
    Change,
    TicketSimilarity,
    detect_collapse,
    layer_similarity,
    semantic_alignment,
    similarity_by_depth,
    spearman,
    ticket_similarity,
)
from hf_rtl.class_similarity import load_class_similarity
from hf_rtl.training.run_directory import REPORT, RunDirectory
from shared.report import table, write_results


@dataclass
class Point:
    """Masks at one sparsity, and the report of the round that they belong to, if they were retrained and evaluated."""

    name: str
    bank: MaskBank
    similarity: TicketSimilarity
    report: dict[str, Any] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="output folder of a run, or folders of saved models")
    parser.add_argument("--class_similarity", type=Path, metavar="PATH", help="csv file, or `dict` folder of WordNet")
    parser.add_argument("--metric", help="of every route; default: balanced_accuracy, or accuracy where there is none")
    parser.add_argument("--at", type=float, metavar="SPARSITY", help="heatmaps of the masks next to it; default: last")
    parser.add_argument("--extraction_dir", type=Path, help="where the masks of the run are, if not in its folder")
    parser.add_argument("--permutations", type=int, default=9999, help="of the Mantel test (default: 9999)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutations (default: 0)")
    parser.add_argument("--output_dir", type=Path, help="default: `analysis` in the run's folder, or in this one")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    is_run = (arguments.paths[0] / "run.json").exists()
    try:
        if is_run and len(arguments.paths) == 1:
            points = points_of_run(arguments.paths[0], arguments.extraction_dir)
        else:
            points = points_of_models(arguments.paths)
        names = points[0].bank.route_names
        classes = None
        if arguments.class_similarity is not None:
            classes = load_class_similarity(arguments.class_similarity, names)
        changes = detect_collapse([point.similarity for point in points])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    metric = arguments.metric or metric_of(points, names)
    figures = [route_figures(point, metric) for point in points]
    print(table([line(point, of_routes) for point, of_routes in zip(points, figures, strict=True)]))
    print("\nSharp changes", *verdict(names, changes, len(points)), sep="\n")
    alignments = None
    if classes is not None:
        alignments = [alignment(point.bank, classes, arguments.permutations, arguments.seed) for point in points]
        print(
            "\nAlignment with the classes: Spearman's correlation (p)",
            table(alignment_rows(points, alignments)),
            sep="\n",
        )
    output_dir = arguments.output_dir or (arguments.paths[0] / "analysis" if is_run else Path("analysis"))
    at = chosen(points, arguments.at)
    order = ordering(points[at].similarity.jaccard if classes is None else classes)
    write_results(
        output_dir / "analysis.json",
        metric=metric,
        points=[content(*parts) for parts in zip(points, figures, alignments or [None] * len(points), strict=True)],
        changes={name: asdict(changes[name]) if name in changes else None for name in names},
        judged=len(points) >= LEAST_POINTS,
        order=[names[route] for route in order],
        class_similarity=None if classes is None else classes.tolist(),
    )
    if find_spec("matplotlib"):
        draw(output_dir, points, figures, changes, metric, points[at].bank, classes, order)
    print(f"\nWritten to {output_dir}")


def points_of_run(run: Path, extraction_dir: Path | None) -> list[Point]:
    """The masks after all prune events that are done for every route, or of the rounds where those are not kept."""
    model = json.loads((run / "run.json").read_text())["configuration"]["model"]
    directory = RunDirectory(run, extraction_dir)
    files = [directory.read_report(file.parent) for file in sorted(run.glob(f"round-*/{REPORT}"))]
    reports = {report["mask_fingerprint"]: report for report in files if report is not None}
    points = []
    for event in range(len(list(directory.extraction_path.glob("event-*")))):
        bank = MaskBank([(name, shape) for name, shape in model["prunable"]], model["route_names"])
        masks = [directory.load_masks(event, route, bank.shapes) for route in range(bank.num_routes)]
        found = [mask for mask in masks if mask is not None]
        if len(found) < bank.num_routes:  # the run has not come further
            break
        for route, mask in enumerate(found):
            bank[route] = mask
        report = reports.get(bank.fingerprint())
        name = report["folder"] if report is not None else f"event {event + 1}"
        points.append(Point(name, bank, ticket_similarity(bank), report))
    if not points and reports:
        return points_of_models([run / report["folder"] for report in reports.values()])
    if not points:
        raise ValueError(f"{str(run)!r} has no masks yet; if they are elsewhere, give --extraction_dir.")
    return points


def points_of_models(folders: Sequence[Path]) -> list[Point]:
    """Saved models, by ascending sparsity. Raises `ValueError` if two are equally sparse, or have other routes."""
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


def metric_of(points: Sequence[Point], names: Sequence[str]) -> str | None:
    """The measure of every route that the reports have, if they have one."""
    reports = [point.report for point in points if point.report is not None]
    for metric in ("balanced_accuracy", "accuracy"):
        if any(f"eval_{names[0]}/{metric}" in report["metrics"] for report in reports):
            return metric
    return None


def route_figures(point: Point, metric: str | None) -> np.ndarray:
    """`metric` of every route, `[K]`; NaN where it was not measured."""
    metrics = {} if point.report is None else point.report["metrics"]
    return np.array([metrics.get(f"eval_{name}/{metric}", math.nan) for name in point.bank.route_names])


def line(point: Point, figures: np.ndarray) -> dict[str, Any]:
    """One line of the table."""
    similarity = point.similarity
    measured = not np.isnan(figures).all()
    rho = float(spearman(figures, similarity.similarity)) if measured and not np.isnan(figures).any() else math.nan
    return {
        "masks": point.name,
        "sparsity": similarity.sparsity,
        "similarity": float(similarity.similarity.mean()),
        "chance": float(similarity.chance.mean()),
        "uniform chance": float(similarity.uniform_chance.mean()),
        "excess": float(similarity.excess.mean()),
        "emptied": sum(map(len, similarity.emptied_layers.values())),
        "accuracy": float(np.nanmean(figures)) if measured else None,
        "its correlation with similarity": None if math.isnan(rho) else rho,
    }


def verdict(names: Sequence[str], changes: dict[str, Change], num_points: int) -> list[str]:
    """A line per route."""
    if num_points < LEAST_POINTS:
        return [f"{num_points} points say nothing; {LEAST_POINTS} are needed. A run has more in its prune events."]
    width = max(map(len, names))
    lines = []
    for name in names:
        change = changes.get(name)
        lines.append(
            f"{name:{width}}  none"
            if change is None
            else f"{name:{width}}  {change.direction} at {change.sparsity:.1%}: excess {change.before:.3f} before, "
            f"{change.found:.3f} found, {change.expected:.3f} expected"
        )
    return lines


def alignment(bank: MaskBank, classes: np.ndarray, num_permutations: int, seed: int) -> dict[str, dict[str, Any]]:
    """By depth."""
    return {
        depth: asdict(semantic_alignment(similarity, classes, num_permutations=num_permutations, seed=seed))
        for depth, similarity in similarity_by_depth(bank).items()
    }


def alignment_rows(points: Sequence[Point], alignments: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "masks": point.name,
            "sparsity": point.similarity.sparsity,
            **{depth: _correlation(found) for depth, found in by_depth.items()},
        }
        for point, by_depth in zip(points, alignments, strict=True)
    ]


def _correlation(found: dict[str, Any]) -> str:
    return "undefined" if math.isnan(found["rho"]) else f"{found['rho']:+.2f} ({found['p_value']:.4f})"


def chosen(points: Sequence[Point], sparsity: float | None) -> int:
    if sparsity is None:
        return len(points) - 1
    return min(range(len(points)), key=lambda index: abs(points[index].similarity.sparsity - sparsity))


def ordering(similarity: np.ndarray) -> list[int]:
    """Routes so that alike ones are neighbours: the leaves of average linkage, in their best order."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    distances = squareform(np.nan_to_num(similarity.max() - similarity) * (1 - np.eye(len(similarity))), checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances)).tolist()


def content(point: Point, figures: np.ndarray, aligned: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """A point as JSON values."""
    similarity, layers = point.similarity, layer_similarity(point.bank)
    names = similarity.route_names
    by_route = ("similarity", "chance", "uniform_chance", "excess", "spread")
    return _plain(
        {
            "masks": point.name,
            "sparsity": similarity.sparsity,
            **{key: dict(zip(names, getattr(similarity, key), strict=True)) for key in by_route},
            "metric": dict(zip(names, figures, strict=True)),
            "jaccard": similarity.jaccard,
            "emptied_layers": similarity.emptied_layers,
            "depths": {depth: _mean_of_pairs(matrix) for depth, matrix in similarity_by_depth(point.bank).items()},
            "layers": {
                layer: {"similarity": values, "chance": chance}
                for layer, values, chance in zip(layers.layer_names, layers.similarity, layers.chance, strict=True)
            },
            "alignment": aligned,
        }
    )


def _mean_of_pairs(similarity: np.ndarray) -> np.ndarray:
    """The mean over all pairs of different tickets; NaN if one is."""
    return similarity[np.triu_indices(len(similarity), k=1)].mean()


def _plain(value: Any) -> Any:
    """Arrays as lists, and `None` for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(
    output_dir: Path,
    points: Sequence[Point],
    figures: Sequence[np.ndarray],
    changes: dict[str, Change],
    metric: str | None,
    bank: MaskBank,
    classes: np.ndarray | None,
    order: list[int],
) -> None:
    """`curves.png` of all points; heatmaps of the masks in `bank` by depth, and of the classes, in the same order."""
    from hf_rtl.plots import route_curves, similarity_heatmap

    names = bank.route_names
    sparsity = torch.tensor([point.similarity.sparsity for point in points])
    similarity = torch.tensor(np.stack([point.similarity.similarity for point in points]))
    excess = torch.tensor(np.stack([point.similarity.excess for point in points]))
    panels = [("similarity to others", sparsity, similarity), ("beyond chance", sparsity, excess)]
    if not np.isnan(figures).all():
        panels.insert(0, (str(metric).replace("_", " "), sparsity, torch.tensor(np.stack(figures))))
    route_curves(
        panels,
        names,
        output_dir / "curves.png",
        chance=(panels[-2][0], torch.tensor([float(point.similarity.chance.mean()) for point in points])),
        marked=[(change.point, names.index(name)) for name, change in changes.items()],
    )
    ordered = [names[route] for route in order]
    for depth, matrix in similarity_by_depth(bank).items():
        heatmap = torch.tensor(matrix[np.ix_(order, order)])
        file = "similarity.png" if depth == "all" else f"similarity-{depth}.png"
        where = "" if depth == "all" else f", {depth} layers"
        similarity_heatmap(heatmap, ordered, output_dir / file, label=f"Jaccard similarity of two tickets{where}")
    if classes is not None:
        heatmap = torch.tensor(classes[np.ix_(order, order)])
        similarity_heatmap(heatmap, ordered, output_dir / "class_similarity.png", label="similarity of two classes")


if __name__ == "__main__":
    main()
