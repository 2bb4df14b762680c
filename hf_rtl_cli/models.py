"""Loading models by name, the files that belong to a model, and folders that are replaced as a whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from hf_rtl import RTLConfig, RTLModel
from hf_rtl.data.rules import TENSORS_FILE
from hf_rtl.modeling.files import written_whole
from hf_rtl.modeling.hub import CARD_FILE


# Files that pipelines read beside a model: image processors, feature extractors, tokenizers.
PROCESSOR_FILES = (
    "*processor_config.json",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "chat_template*",
)
# Files of a model's folder besides its weights: no pickles, no training state.
_OTHER_FILES = (*PROCESSOR_FILES, "*.json", TENSORS_FILE, "*.txt", "*.md", "*.png", "*.svg", "LICENSE")
_CHECKPOINT_FILES = ("trainer_state.json", "checkpoint.json")
_WEIGHT_FILES = ("model*.safetensors", "model*.safetensors.index.json")
# Files that a card is made from.
CARD_SOURCES = [*_WEIGHT_FILES, "*.json", TENSORS_FILE, CARD_FILE]
_REPO_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_model(name: str, *, revision: str | None = None, token: str | None = None) -> RTLModel:
    """The model in the folder or repo `name`. Raises `ValueError` if there is none; see `check_name` too."""
    _check_saved(name, revision=revision)
    # Downloads show a progress bar, but loading tensors does not.
    logging.disable_progress_bar()
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    return RTLModel.from_pretrained(name, revision=revision, token=token)


def load_config(name: str, *, revision: str | None = None, token: str | None = None) -> RTLConfig:
    """The configuration of that model alone. Raises as `load_model`."""
    _check_saved(name, revision=revision)
    return RTLConfig.from_pretrained(name, revision=revision, token=token)


def _check_saved(name: str, *, revision: str | None) -> None:
    check_name(name, revision=revision)
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        models = [str(file.parent) for file in sorted(Path(name).glob("*/config.json"))]
        hint = f" Its folders do: {', '.join(map(repr, models))}." if models else ""
        raise ValueError(f"{name!r} holds no saved model: it has no config.json, which save_pretrained writes.{hint}")


def check_name(name: str, *, revision: str | None = None) -> None:
    """Raises `ValueError` unless `name` is a folder or can be a repo id. Only a repo can have a `revision`."""
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"--revision {revision} needs a repo, but {name!r} is a folder: leave it out.")
    elif os.path.exists(name):
        raise ValueError(f"{name!r} is a file: give the folder that contains it.")
    elif not _REPO_ID.fullmatch(name):
        raise ValueError(f"there is no folder {name!r}, and it is no repo id such as 'org/name'.")


def saved_form(name: str, *, revision: str | None = None, token: str | None = None) -> dict[str, bool]:
    """The arguments of `save_pretrained` that a model was saved with, which a loaded model does not know."""
    file = Path(name, "config.json")
    if not Path(name).is_dir():
        file = Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision, token=token))
    config = json.loads(file.read_text())
    return {"compact": config.get("compact") is not None, "with_code": "auto_map" in config}


def model_files(folder: Path) -> list[Path]:
    """The files in a folder that belong to its model."""
    code = ["*.py"] if saved_form(str(folder))["with_code"] else []
    return _matching(folder, (*_WEIGHT_FILES, *_OTHER_FILES, *code))


def copy_beside(
    name: str, target: Path, patterns: Sequence[str] = _OTHER_FILES, *, revision: str | None, token: str | None
) -> None:
    """Copies the files of a model that match `patterns`, except its weights and configuration."""
    folder = Path(name)
    if not folder.is_dir():
        # Patterns also match files in subfolders, which hold other models.
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    for file in _matching(folder, patterns):
        if file.name != "config.json" and not any(fnmatch(file.name, weights) for weights in _WEIGHT_FILES):
            shutil.copy(file, target / file.name)


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and any(fnmatch(file.name, pattern) for pattern in patterns)
        and not file.name.startswith(".")
        and file.name not in _CHECKPOINT_FILES
    ]


def check_free(folder: Path, *, force: bool) -> None:
    """Raises `ValueError` if `folder` is no folder, or is not empty without `force`."""
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(f"{str(folder)!r} is not empty; --force replaces the model in it.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder.")


def written_model(folder: Path) -> AbstractContextManager[Path]:
    """A temporary folder to write into, in place of `folder`; see `written_whole`. A model in `folder` is replaced."""
    return written_whole(folder.resolve(), last="config.json", stale="model[.-]*")
