"""Trainer checkpoints that are known to be whole: each carries a list of its files with their hashes, written last."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .files import hash_file, write_json


logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"


def seal(checkpoint: Path, *, world_size: int) -> None:
    """Says that a checkpoint is whole, what is in it, and how many processes made it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    hashes = {str(path.relative_to(checkpoint)): hash_file(path) for path in files}
    write_json(checkpoint / SEAL, {"world_size": world_size, "files": hashes})


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has been sealed and holds what it held then."""
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
        return all(hash_file(checkpoint / name) == expected for name, expected in files.items())
    except (FileNotFoundError, KeyError, ValueError):  # another OSError says nothing of what is there
        return False


def is_usable(checkpoint: Path) -> bool:
    """Whether training can go on from a checkpoint: it is whole, and so is the best one so far, which it refers to."""
    if not is_whole(checkpoint):
        return False
    best = best_checkpoint(checkpoint)
    return best is None or is_whole(best)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The best checkpoint when this one was made. It lies beside it, also if the run was moved since."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
    return None if best is None else checkpoint.parent / Path(best).name


def last_usable_checkpoint(folder: Path, *, world_size: int) -> Path | None:
    """
    The latest of a folder's checkpoints that is usable. Those after it are removed: their steps are done again.

    Warns if another number of processes than `world_size` made it: rounding, and what batch norm sees, will change.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(checkpoints, key=_step_of, reverse=True):
        if is_usable(checkpoint):
            made_by = json.loads((checkpoint / SEAL).read_text())["world_size"]
            if made_by != world_size:
                logger.warning(
                    f"{str(checkpoint)!r} was made by {made_by} process(es) and is continued by {world_size}: the "
                    "joint retraining will not be the same to the bit as an uninterrupted one."
                )
            return checkpoint
        logger.warning(f"{str(checkpoint)!r} is cut short or damaged, and removed: its steps are done again.")
        shutil.rmtree(checkpoint)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
