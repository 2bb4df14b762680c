"""How alike the classes of routes are, from a table or from WordNet: what `semantic_alignment` compares masks with."""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def load_class_similarity(path: str | os.PathLike, route_names: Sequence[str]) -> NDArray[np.float64]:
    """
    Similarities of the classes `route_names`, `float64 [K, K]`, from a csv file or a WordNet folder: see
    [`read_class_similarity`] and [`wordnet_similarity`], also for errors.
    """
    path = Path(path)
    return wordnet_similarity(path, route_names) if path.is_dir() else read_class_similarity(path, route_names)


def read_class_similarity(file: str | os.PathLike, route_names: Sequence[str]) -> NDArray[np.float64]:
    """
    Similarities of the classes `route_names` from a table, which may hold others and have them in any order.

    Args:
        file (`str` or path): a csv file with the names in its first row and its first column, numbers elsewhere.
        route_names (`Sequence[str]`): K names, as they are in the file.

    Returns:
        `float64 [K, K]`, in the order of `route_names`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names that are missing, rows and columns that differ, values that are not finite numbers, or a
            matrix that is not symmetric.
    """
    with open(file, newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.reader(opened) if row]
    columns = [name.strip() for name in rows[0][1:]] if rows else []
    if [row[0].strip() for row in rows[1:]] != columns or not columns:
        raise ValueError(
            f"{str(file)!r} must have the same names in its first row and in its first column, in the same order."
        )
    try:
        values = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
    except ValueError as error:
        raise ValueError(f"{str(file)!r} must hold numbers and names only: {error}.") from None
    if values.shape != (len(columns), len(columns)) or not np.isfinite(values).all():
        raise ValueError(f"{str(file)!r} must hold a finite number for every pair of its {len(columns)} names.")
    if not np.allclose(values, values.T):
        raise ValueError(f"{str(file)!r} is not symmetric; the similarity of a and b must be that of b and a.")
    missing = [name for name in route_names if name not in columns]
    if missing:
        close = difflib.get_close_matches(missing[0], columns, n=1)
        raise ValueError(
            f"{str(file)!r} lacks the route(s) {', '.join(map(repr, missing))}"
            f"{f'; did you mean {close[0]!r}?' if close else ''} Its names are {', '.join(map(repr, columns))}."
        )
    order = [columns.index(name) for name in route_names]
    return values[np.ix_(order, order)]


def wordnet_similarity(folder: str | os.PathLike, route_names: Sequence[str]) -> NDArray[np.float64]:
    """
    WordNet path similarity of the classes `route_names`: 1 / (1 + length of the shortest path between them over
    hypernyms of nouns, instance hypernyms included); 0 if nothing is above both.

    A name stands for the first, most frequent sense of its noun: in lower case, with `_` for spaces (`aquarium_fish`).
    A name such as `T-shirt/top` stands for its first part that WordNet knows; if it knows none, for the last word of
    the first part (the head of a compound: `boot` of `Ankle boot`). So read, WordNet 3.0 gives the values that are
    published for CIFAR-10; the most similar of all senses does not: it takes a cat for a tractor of that name.

    Args:
        folder (`str` or path): the `dict` folder of WordNet 3.0, with `index.noun` and `data.noun`; Debian's package
            `wordnet-base` puts it into `/usr/share/wordnet`.
        route_names (`Sequence[str]`): K names of classes.

    Returns:
        `float64 [K, K]`, ones in its diagonal.

    Raises:
        FileNotFoundError: `folder` has no such files.
        ValueError: names that no noun is found for.
    """
    folder = Path(folder)
    for name in ("index.noun", "data.noun"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}; the `dict` folder of WordNet 3.0 is needed, which Debian's "
                "`apt-get install wordnet-base` puts into '/usr/share/wordnet'."
            )
    senses = {lemma: fields[-int(fields[2])] for lemma, fields in _entries(folder / "index.noun")}
    synsets = {name: next((senses[noun] for noun in _nouns(name) if noun in senses), None) for name in route_names}
    unknown = [name for name, synset in synsets.items() if synset is None]
    if unknown:
        raise ValueError(
            f"WordNet has no noun for the route(s) {', '.join(map(repr, unknown))}. Give similarities as a csv file "
            "instead, with these names in its first row and column."
        )
    hypernyms = {synset: _hypernyms(fields) for synset, fields in _entries(folder / "data.noun")}
    above = [_distances(str(synsets[name]), hypernyms) for name in route_names]
    similarity = np.eye(len(route_names))
    for first, second in zip(*np.triu_indices(len(route_names), k=1), strict=True):
        lengths = [steps + above[second][synset] for synset, steps in above[first].items() if synset in above[second]]
        similarity[first, second] = similarity[second, first] = 1 / (1 + min(lengths)) if lengths else 0.0
    return similarity


def _entries(file: Path) -> Iterator[tuple[str, list[str]]]:
    """First field and all fields of every line of a WordNet file; lines of the licence begin with a space."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(" "):
                fields = line.split(" | ", 1)[0].split()
                yield fields[0], fields


def _nouns(name: str) -> list[str]:
    """What a class may be called in WordNet, the best first."""
    parts = [re.sub(r"[\s_]+", "_", part.strip()) for part in name.lower().split("/")]
    return [*parts, parts[0].rsplit("_", 1)[-1]]


def _hypernyms(fields: Sequence[str]) -> list[str]:
    """Synsets right above one, from its line: offset, file, type, words in hexadecimal, each with its number, pointers
    in decimal, each with symbol, offset, part of speech, source and target."""
    start = 4 + 2 * int(fields[3], 16)
    pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
    return [offset for symbol, offset in zip(pointers[::4], pointers[1::4], strict=True) if symbol in ("@", "@i")]


def _distances(synset: str, hypernyms: dict[str, list[str]]) -> dict[str, int]:
    """The synsets above one, itself included, with the least number of steps to each."""
    steps = {synset: 0}
    waiting = [synset]
    for reached in waiting:  # grows as it is read: breadth first
        for above in hypernyms[reached]:
            if above not in steps:
                steps[above] = steps[reached] + 1
                waiting.append(above)
    return steps
