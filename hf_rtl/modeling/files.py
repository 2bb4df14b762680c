"""Files that are never half-written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .hashing import hash_tensors


METADATA_KEY = "hf_rtl"  # of the JSON entry in the header of tensor files


def write_json(file: Path, value: Any, *, owner: str = "") -> None:
    """Writes JSON so that `file` is never half-written. `owner` is part of the temporary file's name."""
    with _beside(file, owner) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises `ValueError` if it holds none, or one that is nested too deeply to be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_values(value: Any) -> Any:
    """`value`, nested to any depth, with `None` in place of NaN and infinities: JSON and YAML lack these numbers."""
    if isinstance(value, Mapping):
        return {name: json_values(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(file: Path, content: bytes) -> None:
    """Writes `content` so that `file` is never half-written."""
    with _beside(file) as beside:
        beside.write_bytes(content)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, owner: str = "", **metadata: str) -> None:
    """
    Writes tensors with a hash of their content and `metadata`, so that `file` is never half-written. Equal arguments
    give equal bytes. `owner` is part of the temporary file's name.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors writes several in arbitrary order.
    described = json.dumps({**metadata, "sha256": hash_tensors(contiguous)}, sort_keys=True)
    with _beside(file, owner) as beside:
        save_file(contiguous, beside, metadata={METADATA_KEY: described})


def read_tensors(file: Path) -> dict[str, Tensor] | None:
    """The tensors that `write_tensors` wrote; `None` if the file is missing, incomplete or altered."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            expected = json.loads(opened.metadata()[METADATA_KEY])["sha256"]
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return tensors if expected == hash_tensors(tensors) else None


@contextmanager
def written_whole(folder: Path, *, last: str, stale: str) -> Iterator[Path]:
    """
    A temporary folder to write into. At the end its files are moved into `folder`, each whole, the file `last` after
    the others. If any of them match the pattern `stale`, older files in `folder` that match it are from an earlier
    save and are removed; other files stay. After an error `folder` has not changed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp") as staging:
        yield Path(staging)
        folder.mkdir(exist_ok=True)
        files = sorted(Path(staging).iterdir(), key=lambda file: file.name == last)
        written = {file.name for file in files}
        for file in files:
            os.replace(file, folder / file.name)
        stale_files = {file.name for file in folder.glob(stale)} - written
        if any(fnmatch(name, stale) for name in written):
            for name in stale_files:
                (folder / name).unlink()


@contextmanager
def _beside(file: Path, owner: str = "") -> Iterator[Path]:
    """A temporary path beside `file`: renamed to `file` once it is written, removed on an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{owner}{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
