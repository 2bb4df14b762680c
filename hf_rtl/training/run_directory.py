"""The directory of a training run: its files, how they are written, and checks that they fit a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from ..modeling.files import read_json, read_tensors, write_json, write_tensors
from ..modeling.hashing import has_hash, hash_file
from ..modeling.mask_bank import MaskBank
from .run_identity import with_later_fields


logger = logging.getLogger(__name__)

_NUM_SHOWN = 12  # most differences that an error lists
REPORT_FILE = "round.json"
RETRAINED_FILE = "retrained.json"
# What a continued run reads of a report.
_READ_OF_REPORTS: dict[str, Any] = {
    "folder": str,
    "files": dict,
    "mask_fingerprint": str,
    "thresholds": (list, type(None)),
    "metrics": (dict, type(None)),
    "train_loss": float,
    "steps": int,
    "log_history": list,
}


class OtherRunError(ValueError):
    """A directory holds a run, or masks, of another configuration, or one that cannot be read."""


class RunDirectory:
    """
    The files of a run:

    ```
    run.json                                    configuration, versions, hashes
    theta0.safetensors                          θ0, from which every event and every joint retraining starts
    extraction/extraction.json                  the part of the configuration that decides the masks
    extraction/event-NNN/route-KKK.safetensors  the mask of a route after a prune event
    round-NN-sparsity-S/                        a complete model, with that round's Trainer checkpoints inside
    round-NN-sparsity-S/round.json              the round's report: the round is finished
    round-NN-sparsity-S/retrained.json          the report before the evaluation, until `round.json` is written
    final/                                      the last round's model
    ```
    A file with its final name is whole: it was written under another name and then renamed. Tensor files contain a
    hash of their content, so a damaged file is detected and its work is done again.
    """

    def __init__(self, path: str | os.PathLike, extraction_path: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self.extraction_path = self.path / "extraction" if extraction_path is None else Path(extraction_path)
        # Part of the names of temporary files, so that they differ from those of other runs.
        self.owner = hashlib.sha256(str(self.path.absolute()).encode()).hexdigest()[:8] + "-"

    def mask_file(self, event: int, route: int) -> Path:
        return self.extraction_path / f"event-{event:03d}" / f"route-{route:03d}.safetensors"

    @property
    def theta0_file(self) -> Path:
        return self.path / "theta0.safetensors"

    @property
    def final_folder(self) -> Path:
        return self.path / "final"

    def open(
        self, configuration: Mapping[str, Any], extraction: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        """
        Starts a run in this directory, or continues its run.

        Args:
            configuration (`Mapping[str, Any]`), extraction (`Mapping[str, Any]`): the same as for `check`.
            environment (`Mapping[str, str]`): versions and devices, which decide rounding. Warns of differences.

        Raises:
            OtherRunError: the same as for `check`.
        """
        saved = self.check(configuration, extraction)
        for file, settings in saved.items():
            _warn_of_other_environment(file, settings["surroundings"], environment)
        self._remove_temporary_files()
        for file, content in self._settings(configuration, extraction).items():
            if not file.exists():
                write_json(file, {"configuration": content, "surroundings": environment}, owner=self.owner)

    def check(self, configuration: Mapping[str, Any], extraction: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
        """
        Checks that a run can start or continue in this directory, and writes nothing.

        Args:
            configuration (`Mapping[str, Any]`), extraction (`Mapping[str, Any]`): the results of `run_identity`. To
                continue they must be the same as in the files, except for fields that `with_later_fields` adds.

        Returns:
            The content of the files that exist.

        Raises:
            OtherRunError: the directory holds a run, or extracted masks, of another configuration (the error names the
                values that differ, and how to keep the masks if they fit), or a file with a configuration is damaged.
        """
        settings = self._settings(configuration, extraction)
        saved = {file: _read_settings(file) for file in settings if file.exists()}
        run, masks = (_differences_from_file(file, saved.get(file), content) for file, content in settings.items())
        if run or masks:
            raise OtherRunError(self._explain(run, masks, fit=len(saved) == 2 and not masks))
        return saved

    def _settings(
        self, configuration: Mapping[str, Any], extraction: Mapping[str, Any]
    ) -> dict[Path, Mapping[str, Any]]:
        return {self.path / "run.json": configuration, self.extraction_path / "extraction.json": extraction}

    def _explain(self, run: str, masks: str, *, fit: bool) -> str:
        """
        Args:
            run (`str`), masks (`str`): the differences from the run and from the masks on disk.
            fit (`bool`): whether the masks on disk can be used.
        """
        if not run:
            return (
                f"{str(self.extraction_path)!r} holds masks of another configuration ({masks}). Choose another "
                "`extraction_dir`, or leave it out; or give the same arguments to use these masks."
            )
        if "initial_weights" in run:
            run += ". The model was trained since, or has another seed: build it anew as for that run"
        way_out = "Choose another `output_dir`, and another `extraction_dir` if it is set"
        if fit:
            way_out = (
                "Its masks fit: to keep them, choose another `output_dir`, and give "
                f"`extraction_dir={str(self.extraction_path)!r}`"
            )
        return (
            f"{str(self.path)!r} holds a run of another configuration ({run}). {way_out}; or give the same arguments "
            "and data to continue that run."
        )

    def _remove_temporary_files(self) -> None:
        """Removes the temporary files and folders of a killed run, but none of another run."""
        own = [".run.json.*", ".theta0.safetensors.*", ".round-*", ".final-*", ".shared.*"]
        left = [path for pattern in own for path in self.path.glob(f"{pattern}.tmp")]
        left += [*self.path.glob("round-*/**/.*.tmp"), *self.final_folder.glob(".*.tmp")]
        left += [file.with_name(RETRAINED_FILE) for file in self.path.glob(f"*/{REPORT_FILE}")]
        # Other runs may write masks into the same folder.
        left += self.extraction_path.glob(f"**/.*.{self.owner}*.tmp")
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def mark_retrained(self, folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
        """
        Marks a round as retrained and saved, but not evaluated. Returns the written report, to which hashes of the
        model's `files` are added.
        """
        (folder / REPORT_FILE).unlink(missing_ok=True)  # of an earlier model, which was damaged
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
        written = {**report, "files": {file.name: hash_file(file) for file in files if file.name != RETRAINED_FILE}}
        write_json(folder / RETRAINED_FILE, written)
        return written

    def write_report(self, folder: Path, report: Mapping[str, Any]) -> None:
        """Marks a round as finished: it is evaluated too. `report` is that of `mark_retrained`, completed."""
        write_json(folder / REPORT_FILE, report)
        (folder / RETRAINED_FILE).unlink(missing_ok=True)

    def read_report(self, folder: Path) -> dict[str, Any] | None:
        """
        The report of a round that is finished, or retrained only; `None` if it is neither, or its report or model is
        damaged.
        """
        file = next((folder / name for name in (REPORT_FILE, RETRAINED_FILE) if (folder / name).exists()), None)
        if file is None:
            return None
        try:
            report = read_json(file)
            if not all(isinstance(report[name], kind) for name, kind in _READ_OF_REPORTS.items()):
                raise TypeError
            damaged = [name for name, expected in report["files"].items() if not has_hash(folder / name, expected)]
        except (AttributeError, KeyError, TypeError, ValueError):
            damaged = [file.name]
        if damaged:
            logger.warning(f"{damaged[0]} in {str(folder)!r} is damaged: the joint retraining is done again.")
            return None
        return report

    def save_mask(self, event: int, route: int, packed: Sequence[Tensor], *, started_from: str = "") -> None:
        """
        Writes a route's mask after an event.

        Args:
            packed (`Sequence[Tensor]`): its rows, `uint8`, one per prunable weight, as `MaskBank.pack` returns them.
            started_from (`str`, *optional*): hash of the parameters and buffers that its training started from.
        """
        tensors = {f"m{layer:04d}": row.cpu() for layer, row in enumerate(packed)}
        write_tensors(self.mask_file(event, route), tensors, owner=self.owner, started_from=started_from)

    def load_mask(self, event: int, route: int, bank: MaskBank | None = None) -> list[Tensor] | None:
        """The packed rows that `save_mask` wrote; `None` if they are missing or damaged, or do not fit `bank`."""
        tensors = read_tensors(self.mask_file(event, route))
        if tensors is None:
            return None
        packed = [tensors[name] for name in sorted(tensors)]
        return packed if bank is None or bank.fits(packed) else None


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        saved = read_json(file)
        return {"configuration": saved["configuration"], "surroundings": saved["surroundings"]}
    except (KeyError, TypeError, ValueError):
        raise _damaged(file) from None


def _damaged(file: Path) -> OtherRunError:
    return OtherRunError(
        f"{str(file)!r} is damaged, so the configuration of the run in this folder is unknown. Delete the folder, "
        "or choose another one."
    )


def _differences_from_file(file: Path, saved: Mapping[str, Any] | None, configuration: Mapping[str, Any]) -> str:
    """The differences of a configuration from the one in its file; `""` if there are none, or no file."""
    if saved is None:
        return ""
    current = json.loads(json.dumps(configuration))
    try:
        completed = json.loads(json.dumps(with_later_fields(saved["configuration"], current)))
    except (AttributeError, KeyError, TypeError):  # a value of another kind than any version has written
        raise _damaged(file) from None
    return _differences(completed, current)


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    differences = [_in_words(path, old, new) for path, old, new in _pairs(saved, current)]
    more = len(differences) - _NUM_SHOWN
    return "; ".join(differences[:_NUM_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def _in_words(path: str, old: Any, new: Any) -> str:
    if all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in (old, new)):
        return f"other {path}"  # hashes say nothing to a reader
    return f"{path}: {json.dumps(old)} there, {json.dumps(new)} now"


def _pairs(saved: Any, current: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The path of every value that differs, and both values; a missing one is `None`."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in {**saved, **current}:
            yield from _pairs(saved.get(name), current.get(name), f"{path}.{name}" if path else name)
    elif isinstance(saved, list) and isinstance(current, list) and max(len(saved), len(current)) > _NUM_SHOWN:
        for index, (old, new) in enumerate(itertools.zip_longest(saved, current)):
            yield from _pairs(old, new, f"{path}[{index}]")
    elif saved != current:
        yield path, saved, current


def _warn_of_other_environment(file: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    differences = _differences(saved, current)
    if differences:
        logger.warning(
            f"{str(file.parent)!r} was started in another environment, or with other transforms of the data "
            f"({differences}): new results may differ from those of an uninterrupted run, at least in rounding, and "
            "so in masks."
        )


logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.json"


def mark_complete(checkpoint: Path, *, world_size: int) -> None:
    """Marks a checkpoint as whole: writes hashes of its files, and the number of processes that made it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKPOINT_FILE)
    hashes = {str(path.relative_to(checkpoint)): hash_file(path) for path in files}
    write_json(checkpoint / CHECKPOINT_FILE, {"world_size": world_size, "files": hashes})


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is marked as whole and its files have not changed since."""
    try:
        mark = read_json(checkpoint / CHECKPOINT_FILE)
        files = mark["files"]
        return isinstance(mark["world_size"], int) and all(
            has_hash(checkpoint / name, expected) for name, expected in files.items()
        )
    except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError):  # another OSError proves no damage
        return False


def is_usable(checkpoint: Path) -> bool:
    """Whether training can continue from a checkpoint: it is whole, and so is the best checkpoint that it names."""
    if not is_whole(checkpoint):
        return False
    try:
        best = best_checkpoint(checkpoint)
    except (FileNotFoundError, KeyError, TypeError, ValueError):  # no trainer has written this
        return False
    return best is None or is_whole(best)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The best checkpoint at the time of this one. It is looked up beside this one, because a run may be moved."""
    best = read_json(checkpoint / TRAINER_STATE_NAME)["best_model_checkpoint"]
    return None if best is None else checkpoint.parent / Path(best).name


def last_usable_checkpoint(folder: Path, *, world_size: int) -> Path | None:
    """
    The latest usable checkpoint in a folder. Removes all later ones; their steps are done again.

    Warns if another number of processes than `world_size` made it: rounding and the batches of batch norm will change.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(checkpoints, key=_checkpoint_step, reverse=True):
        if is_usable(checkpoint):
            made_by = json.loads((checkpoint / CHECKPOINT_FILE).read_text())["world_size"]
            if made_by != world_size:
                logger.warning(
                    f"{str(checkpoint)!r} was made by {made_by} process(es) and is continued by {world_size}: the "
                    "joint retraining will not be bit-identical to an uninterrupted one."
                )
            return checkpoint
        logger.warning(f"{str(checkpoint)!r} is incomplete or damaged and is removed: its steps are done again.")
        shutil.rmtree(checkpoint)
    return None


def _checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
