"""
Show how similar the tickets of a run are as they grow sparser, whether they collapse, and whether their similarity
follows the meaning of their classes. The command reads masks and reports; it trains and evaluates nothing.

    python recipes/analyze.py runs/digits
    python recipes/analyze.py runs/cifar10 --class_similarity similarity.csv
    python recipes/analyze.py runs/cifar10 --class_similarity /usr/share/wordnet      # apt-get install wordnet-base
    python recipes/analyze.py model-at-50 model-at-75 model-at-90 --output_dir analysis

Given a run, the command analyses the masks after every prune event; given saved models, only their masks.

Columns. similarity: mean Jaccard similarity to the other tickets. chance: the similarity of random masks with the same
density in every layer; uniform chance: with the same density over all layers. excess: similarity - chance; a positive
excess says that tickets share more than their densities explain. emptied: layers without a kept weight, summed up.

Sharp changes. If a route's excess leaves its earlier trend sharply, up or down, tickets may collapse. This warning
needs no labels, but at least five points. hf_rtl.analysis.detect_change defines what is sharp.

Alignment. Spearman's correlation between the similarities of tickets and those of their classes, over pairs of routes,
in all layers and in the shallow, middle and deep third, with the p-value of a Mantel test. With WordNet, the names of
routes must be nouns. For other names, give a csv file with the names in its first row and column.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hf_rtl.analysis import LEAST_POINTS, Change, detect_collapse, layer_similarity, similarity_by_depth
from hf_rtl.class_similarity import load_class_similarity
from hf_rtl.modeling.files import json_values
from shared.points import (
    Point,
    alignment,
    choose_metric,
    ordering,
    point_line,
    points_of_models,
    points_of_run,
    route_values,
)
from shared.report import table, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="output folder of a run, or folders of saved models")
    parser.add_argument("--class_similarity", type=Path, metavar="PATH", help="csv file, or `dict` folder of WordNet")
    parser.add_argument("--metric", help="metric of every route; default: balanced_accuracy, else accuracy")
    parser.add_argument("--at", type=float, metavar="SPARSITY", help="heatmaps at the nearest sparsity; default: last")
    parser.add_argument("--extraction_dir", type=Path, help="folder of the run's masks, if not in its folder")
    parser.add_argument("--permutations", type=int, default=9999, help="number for the Mantel test (default: 9999)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the permutations (default: 0)")
    parser.add_argument("--output_dir", type=Path, help="default: `analysis` in the run's folder, or here")
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
    metric = arguments.metric or choose_metric(points, names)
    values = [route_values(point, metric) for point in points]
    print(table([point_line(point, by_route) for point, by_route in zip(points, values, strict=True)]))
    print("\nSharp changes", *verdict(names, changes, len(points)), sep="\n")
    alignments = None
    if classes is not None:
        alignments = [alignment(point.bank, classes, arguments.permutations, arguments.seed) for point in points]
        lines = alignment_rows(points, alignments)
        print("\nAlignment with the classes: Spearman's correlation (p)", table(lines), sep="\n")
    output_dir = arguments.output_dir or (arguments.paths[0] / "analysis" if is_run else Path("analysis"))
    at = nearest_point(points, arguments.at)
    order = ordering(points[at].similarity.jaccard if classes is None else classes)
    write_results(
        output_dir / "analysis.json",
        metric=metric,
        points=[content(*parts) for parts in zip(points, values, alignments or [None] * len(points), strict=True)],
        changes={name: asdict(changes[name]) if name in changes else None for name in names},
        judged=len(points) >= LEAST_POINTS,
        order=[names[route] for route in order],
        class_similarity=None if classes is None else classes.tolist(),
    )
    if find_spec("matplotlib"):
        from shared.plots import draw_points

        draw_points(points, values, changes, metric, points[at].bank, classes, order, output_dir)
    print(f"\nWritten to {output_dir}")


def verdict(names: Sequence[str], changes: dict[str, Change], num_points: int) -> list[str]:
    """A line for each route: its sharp change, or none."""
    if num_points < LEAST_POINTS:
        return [f"{num_points} points say nothing; {LEAST_POINTS} are needed. A run's folder has one per prune event."]
    width = max(map(len, names))
    found = {
        name: f"{change.direction} at {change.sparsity:.1%}: excess {change.before:.3f} before, "
        f"{change.found:.3f} found, {change.expected:.3f} expected"
        for name, change in changes.items()
    }
    return [f"{name:{width}}  {found.get(name, 'none')}" for name in names]


def alignment_rows(points: Sequence[Point], alignments: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line per point, a column per depth."""
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


def nearest_point(points: Sequence[Point], sparsity: float | None) -> int:
    """The index of the point nearest to a sparsity; without a sparsity, of the last point."""
    if sparsity is None:
        return len(points) - 1
    return min(range(len(points)), key=lambda index: abs(points[index].similarity.sparsity - sparsity))


def content(point: Point, values: np.ndarray, aligned: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """A point as JSON values."""
    similarity, layers = point.similarity, layer_similarity(point.bank)
    names = similarity.route_names
    by_route = {key: getattr(similarity, key) for key in ("similarity", "chance", "uniform_chance", "excess")}
    by_route["spread"] = similarity.deviation
    return json_values(
        {
            "masks": point.name,
            "sparsity": similarity.sparsity,
            **{key: dict(zip(names, row, strict=True)) for key, row in by_route.items()},
            "metric": dict(zip(names, values, strict=True)),
            "jaccard": similarity.jaccard.tolist(),
            "emptied_layers": similarity.emptied_layers,
            "depths": {depth: _mean_of_pairs(matrix) for depth, matrix in similarity_by_depth(point.bank).items()},
            "layers": {
                layer: {"similarity": found.tolist(), "chance": chance.tolist()}
                for layer, found, chance in zip(layers.layer_names, layers.similarity, layers.chance, strict=True)
            },
            "alignment": aligned,
        }
    )


def _mean_of_pairs(similarity: np.ndarray) -> float:
    """The mean over all pairs of different tickets; NaN if the similarity of a pair is NaN."""
    return similarity[np.triu_indices(len(similarity), k=1)].mean()


if __name__ == "__main__":
    main()
