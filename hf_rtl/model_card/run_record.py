"""The record of the run that made a model, in a file beside the model, for its card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..data.rules import RULE_FILE, TENSORS_FILE, remove_unfitting_rule, save_rule
from ..modeling.files import write_json
from ..modeling.modeling_rtl import RTLModel
from ..modeling.ticket_files import base_fingerprint


RUN_FILE = "training_run.json"
ARGUMENTS_FILE = "training_args.json"  # all arguments of a run, which its trainer saves beside the model


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    write_json(folder / RUN_FILE, run)


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record that `write_run` wrote; `None` if there is none."""
    file = folder / RUN_FILE
    return json.loads(file.read_text()) if file.exists() else None


def copy_run(model: RTLModel, folder: Path, *, token: bool | str | None) -> None:
    """
    Writes the record of the run that made `model` into `folder`, unless the model has changed since. After a training
    the record is `model.training_run`, otherwise the file beside the weights that the model was loaded from. Also
    writes the rule of the partition, unless the model has other routes now.
    """
    _copy_rule(model, folder, token)
    if model.training_run is not None:
        if was_trained_by(model.training_run, model):
            write_run(folder, model.training_run)
        return
    file = _loaded_with(model, RUN_FILE, token)
    if file is not None and was_trained_by(json.loads(file.read_text()), model):
        shutil.copy(file, folder / RUN_FILE)
        arguments = _loaded_with(model, ARGUMENTS_FILE, token)
        if arguments is not None:
            shutil.copy(arguments, folder / ARGUMENTS_FILE)


def _copy_rule(model: RTLModel, folder: Path, token: bool | str | None) -> None:
    if model.partition_rule is not None:
        save_rule(folder, model.partition_rule)
    elif model.training_run is None:
        for name in (RULE_FILE, TENSORS_FILE):
            file = _loaded_with(model, name, token)
            if file is not None:
                shutil.copy(file, folder / name)
    remove_unfitting_rule(folder, model.route_names)


def _loaded_with(model: RTLModel, name: str, token: bool | str | None) -> Path | None:
    """A file of the folder, or of the commit on the Hub, that a model was loaded from; `None` if it is missing."""
    source = model.name_or_path
    if model.loaded_commit is None:
        file = Path(source, name)
        return file if source and file.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=model.loaded_commit, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError):  # the file or repository is missing, or the token has no access
        return None


def was_trained_by(run: Mapping[str, Any], model: RTLModel) -> bool:
    """Whether `model` has the masks and weights that the run ended with."""
    return run["model"] == model_identity(model)


def model_identity(model: RTLModel) -> dict[str, Any]:
    return {"masks": model.mask_bank.fingerprint(), "weights": base_fingerprint(model)["fingerprint"]}
