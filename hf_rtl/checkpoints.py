"""Trainer checkpoints that are known to be whole: each carries a list of its files with their hashes, written last."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from .run_directory import hash_file, write_json


logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"


def seal(checkpoint: Path) -> None:
    """Says that a checkpoint is whole, and what is in it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): hash_file(path) for path in files})


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has been sealed and holds what it held then."""
    try:
        hashes = json.loads((checkpoint / SEAL).read_text())
        return all(hash_file(checkpoint / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError):
        return False


def last_whole_checkpoint(folder: Path) -> str | None:
    """The latest of a folder's checkpoints that is whole. Those after it are removed: their steps are done again."""
    for checkpoint in sorted(folder.glob("checkpoint-[0-9]*"), key=_step_of, reverse=True):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning(f"{str(checkpoint)!r} is cut short or damaged, and removed: its steps are done again.")
        shutil.rmtree(checkpoint)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
