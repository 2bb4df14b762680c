"""What is wrong with data, said before a run: empty and tiny cells, unreadable files, copies of samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .arguments import BadInput
from .data_arguments import DataArguments
from .rows import LABEL, Rows


# A route with fewer samples of a label hardly learns it.
FEW = 5
# Reading more samples to hash them takes minutes.
MOST_HASHED = 100_000
_MOST_COLUMNS = 20


def routes_by_labels(rows: Rows) -> list[dict[str, Any]]:
    """Lines for `report.table`: the number of training samples of every route, and of each of its labels."""
    if not rows.route_names:
        return []
    routes = np.asarray(rows.train[rows.route_column])
    tests = np.bincount(rows.test[rows.route_column], minlength=len(rows.route_names))
    labelled = rows.label_names and rows.route_column != LABEL and len(rows.label_names) <= _MOST_COLUMNS
    labels = np.asarray(rows.train[LABEL]) if labelled else np.empty(0)
    lines = []
    for route, name in enumerate(rows.route_names):
        line: dict[str, Any] = {"route": name, "training samples": int((routes == route).sum())}
        if labelled:
            numbers = np.bincount(labels[routes == route], minlength=len(rows.label_names)).tolist()
            line |= {f"of {label}": number for label, number in zip(rows.label_names, numbers, strict=True)}
        lines.append({**line, "test samples": int(tests[route])})
    return lines


def warnings_of(rows: Rows) -> list[str]:
    """Sentences on what is likely a mistake in the data; none if nothing is."""
    found = []
    lines = routes_by_labels(rows)
    if rows.ticket_task == "labels" and rows.label_names and rows.route_column != LABEL:
        for kind, matches in (("no", lambda number: number == 0), (f"fewer than {FEW}", lambda n: 0 < n < FEW)):
            cells = [
                f"{line['route']!r} of {title.removeprefix('of ')!r}"
                for line in lines
                for title, number in line.items()
                if title.startswith("of ") and matches(number)
            ]
            if cells:
                found.append(f"{len(cells)} pairs of route and label have {kind} training samples: {_first(cells)}.")
    untested = [repr(line["route"]) for line in lines if not line["test samples"]]
    if untested:
        found.append(
            f"{len(untested)} routes have no test sample, so their tickets are not measured: {_first(untested)}."
        )
    return found + copies(rows)


def copies(rows: Rows) -> list[str]:
    """A sentence on test samples that are training samples too, found by a hash of their bytes; none if none is."""
    if len(rows.train) + len(rows.test) > MOST_HASHED:
        return [
            f"more than {MOST_HASHED:,} samples: copies of training samples in the test split were not looked for."
        ]
    known = {_hash(value): index for index, value in enumerate(rows.train[rows.input_column])}
    both = [
        f"test sample {index} is training sample {known[key]}"
        for index, value in enumerate(rows.test[rows.input_column])
        if (key := _hash(value)) in known
    ]
    if not both:
        return []
    return [f"{len(both)} of {len(rows.test)} test samples are training samples too, which flatters: {_first(both)}."]


def readable(rows: Rows, arguments: DataArguments, decode: Callable[[Any], Any]) -> tuple[Rows, list[str]]:
    """
    The rows whose images or sounds can be read, and a sentence on those that are left out.

    Args:
        decode (`Callable`): decodes an image or a sound, for `check_files` and `skip_unreadable`. By default the
            headers are read.

    Raises:
        BadInput: a file cannot be read, unless `skip_unreadable`.
    """
    whole = arguments.check_files or arguments.skip_unreadable
    check = decode if whole else {"image": image_header, "audio": audio_header}[rows.task]
    left_out = []
    for name in ("train", "test"):
        data: Dataset = getattr(rows, name)
        good = []
        for index, value in enumerate(data[rows.input_column]):
            try:
                check(value)
                good.append(index)
            except Exception as error:  # Every decoder has errors of its own.
                left_out.append(f"{file_name(value, index)} ({_in_one_line(error)})")
        if not good:
            raise BadInput(f"no file of the {name} split can be read: {_first(left_out)}.")
        if len(good) < len(data):
            setattr(rows, name, data.select(good))
    if left_out and not arguments.skip_unreadable:
        raise BadInput(
            f"{len(left_out)} files cannot be read: {_first(left_out)}. Mend them, or leave them out with "
            "--skip_unreadable."
        )
    said = [f"{len(left_out)} unreadable files are left out: {_first(left_out)}."] if left_out else []
    return rows, said


def image_header(value: dict[str, Any]) -> tuple[int, int]:
    """The size of an image, without decoding it."""
    from PIL import Image

    with Image.open(opened(value)) as image:
        return image.size


def audio_header(value: dict[str, Any]) -> int:
    """The number of samples of a sound, without decoding it."""
    import soundfile

    frames = soundfile.info(opened(value)).frames
    if not frames:
        raise ValueError("it has no samples")
    return frames


def opened(value: dict[str, Any]) -> Any:
    """What decoders read an undecoded image or sound from: its bytes, or its path."""
    if value is None:
        raise ValueError("it is missing")
    return value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])


def file_name(value: dict[str, Any] | None, index: int) -> str:
    """How a sample is named in messages: by its file, or else by its position."""
    return repr(Path(value["path"]).name) if value and value["path"] else f"sample {index}"


def _hash(value: Any) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    raw = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(raw, digest_size=16).digest()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _first(items: list[str], number: int = 5) -> str:
    return ", ".join(items[:number]) + (", …" if len(items) > number else "")
