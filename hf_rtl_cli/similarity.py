"""`hf-rtl similarity`: shows how similar the tickets of a model are."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import itertools
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from wcwidth import wcswidth

from hf_rtl import MaskBank, plots
from hf_rtl.modeling.files import json_values, write_bytes

from .models import load_model
from .tables import bar, fraction, listing, more, printable, shortened, table, terminal_width, wrapped


_MAX_ROUTES = 20
_MAX_PAIRS = 5
_MAX_WEIGHTS = 30
# Widths of a matrix in columns: for the names of its rows at least, and for a number with the space before it.
_LABEL, _CELL = 12, 6
_MATRICES = ("jaccard", "chance", "corrected")


def similarity_values(bank: MaskBank) -> dict[str, list[list[float | None]]]:
    """
    Three matrices over pairs of tickets, `[num_routes, num_routes]`: the Jaccard similarity, that of independent masks
    with the same densities (chance), and the corrected similarity (jaccard - chance) / (1 - chance). `None` where a
    value is undefined.
    """
    return _as_values(bank.similarity(), bank.chance_similarity())


def _as_values(jaccard: Tensor, chance: Tensor) -> dict[str, list[list[float | None]]]:
    matrices = {"jaccard": jaccard, "chance": chance, "corrected": (jaccard - chance) / (1 - chance)}
    return json_values({name: matrix.tolist() for name, matrix in matrices.items()})


def run(args: argparse.Namespace) -> dict[str, Any]:
    plot = None if args.plot is None else _plot_file(args.plot)
    bank = load_model(args.model, revision=args.revision, token=args.token).mask_bank
    jaccard, chance = bank.similarity(per_layer=args.per_layer), bank.chance_similarity(per_layer=args.per_layer)
    values = {"model": args.model, "routes": bank.route_names, **similarity_values(bank)}
    if args.per_layer:
        matrices = zip(bank.weight_names, jaccard, chance, strict=True)
        values["weights"] = [{"name": name, **_as_values(*pair)} for name, *pair in matrices]
    if plot is not None and args.per_layer:
        plots.layer_profile(jaccard, chance, bank.weight_names, plot)
    elif plot is not None:
        plots.similarity_heatmap(jaccard, bank.route_names, plot, chance=chance)
    if args.csv is not None:
        write_bytes(Path(args.csv), _csv(values).encode())
    return values


def _plot_file(name: str) -> Path:
    if not name.endswith(".png"):
        raise ValueError(f"--plot draws PNG files: give it a name such as {Path(name).with_suffix('.png').name!r}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install hf_rtl[plots]")
    return Path(name)


def _csv(values: dict[str, Any]) -> str:
    """A line per pair of tickets, or per weight and pair if `values` has `weights`; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["weight"] if "weights" in values else []), "route", "other", *_MATRICES])
    for weight in values.get("weights", [values]):
        for first, second in itertools.combinations(range(len(values["routes"])), 2):
            pair = [values["routes"][first], values["routes"][second]]
            name = [weight["name"]] if "weights" in values else []
            writer.writerow([*name, *pair, *(weight[matrix][first][second] for matrix in _MATRICES)])
    return text.getvalue()


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    parts = [pairs_text(values, values["routes"], show_all=args.all, corrected=True)]
    if args.per_layer:
        parts.append(_weights_text(values["weights"], None if args.all else _MAX_WEIGHTS))
    return "\n\n".join(parts)


def pairs_text(similarity: dict[str, Any], routes: list[str], *, show_all: bool, corrected: bool = False) -> str:
    """
    The similarity of each pair of tickets as matrices, if the terminal is wide enough; otherwise every ticket's mean,
    and the most and least similar pairs.

    Args:
        similarity (`dict`): the result of `similarity_values`.
        routes (`list[str]`): names of the tickets.
        show_all (`bool`): show complete lists.
        corrected (`bool`, defaults to `False`): add the matrix that is corrected for chance.
    """
    if len(routes) == 1:
        return "Similarity: the model has only one ticket, so there is nothing to compare it with."
    names = list(map(printable, routes))
    if _LABEL + _CELL * len(names) <= terminal_width():
        parts = [f"Similarity (Jaccard) of each pair of tickets\n{_matrix(similarity['jaccard'], names)}"]
        if corrected:
            parts.append(f"The same, corrected for chance\n{_matrix(similarity['corrected'], names)}")
    else:
        parts = [_means(similarity, names, None if show_all else _MAX_ROUTES)]
        parts += _extremes(similarity, names, show_all=show_all)
    means = {name: _mean(_off_diagonal(matrix)) for name, matrix in similarity.items() if name in _MATRICES}
    summary = (
        f"Mean over pairs: {fraction(means['jaccard'])}; chance (random masks with the same densities): "
        f"{fraction(means['chance'])}; corrected for chance: {fraction(means['corrected'])}."
    )
    return "\n\n".join([*parts, wrapped(summary)])


def _matrix(matrix: list[list[float | None]], names: list[str]) -> str:
    headers, labels = names, names
    if max(map(wcswidth, names)) > _CELL - 2:
        headers = [str(number) for number in range(len(names))]
        labels = [f"{number:>2} {name}" for number, name in enumerate(names)]
    rows = [[label, *(fraction(value, 2) for value in row)] for label, row in zip(labels, matrix, strict=True)]
    return table(["route", *headers], rows)


def _means(similarity: dict[str, Any], names: list[str], limit: int | None) -> str:
    """A line for each ticket, with its means over all other tickets."""
    rows = []
    for index, name in enumerate(names[:limit]):
        means = []
        for matrix in _MATRICES:
            row = similarity[matrix][index]
            means.append(_mean(row[:index] + row[index + 1 :]))
        rows.append([name, *map(fraction, means), bar(means[0] or 0, means[0] or 0, 10)])
    title = "Similarity (Jaccard) of each ticket to the others: means"
    lines = [title, table(["route", *_MATRICES, ""], rows), *more(len(names) - len(rows))]
    return "\n".join(lines)


def _extremes(similarity: dict[str, Any], names: list[str], *, show_all: bool) -> list[str]:
    pairs = [
        (*(similarity[matrix][first][second] for matrix in _MATRICES), first, second)
        for first, second in itertools.combinations(range(len(names)), 2)
    ]
    pairs = sorted((pair for pair in pairs if pair[0] is not None), key=lambda pair: pair[0], reverse=True)
    if show_all:
        titled = {"All pairs": pairs}
    else:
        titled = {"Most similar": pairs[:_MAX_PAIRS], "Least similar": pairs[-_MAX_PAIRS:][::-1]}
    size = (terminal_width() - 35) // 2
    texts = []
    for title, chosen in titled.items():
        rows = [
            [f"{shortened(names[first], size)} - {shortened(names[second], size)}", *map(fraction, values)]
            for *values, first, second in chosen
        ]
        texts.append(f"{title}\n{table(['pair', *_MATRICES], rows)}")
    return texts


def _weights_text(weights: list[dict[str, Any]], limit: int | None) -> str:
    """A line for each weight, with means over all pairs of tickets."""
    rows = []
    for weight in weights[:limit]:
        pairs = [value for value in _off_diagonal(weight["jaccard"]) if value is not None]
        means = [_mean(_off_diagonal(weight[matrix])) for matrix in _MATRICES]
        shown = bar(min(pairs), max(pairs), 12) if pairs else "all empty"
        rows.append([printable(weight["name"]), *map(fraction, means), shown])
    title = "Similarity in each weight, means over pairs; bars: full to the minimum, half full to the maximum"
    return listing(title, ["weight", *_MATRICES, ""], rows, len(weights) - len(rows))


def _off_diagonal(matrix: list[list[float | None]]) -> list[float | None]:
    return [matrix[first][second] for first, second in itertools.combinations(range(len(matrix)), 2)]


def _mean(values: list[float | None]) -> float | None:
    """The mean of the defined values; `None` if there are none."""
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None
