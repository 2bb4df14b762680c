"""Models by name, and folders that are written whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from hf_rtl import RTLModel


_REPO_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_model(name: str, *, revision: str | None = None, token: str | None = None) -> RTLModel:
    """The model in the folder `name`, or of the repo of that name."""
    check_name(name, revision=revision)
    # The bar that counts loaded tensors is noise; that of a download is not.
    logging.disable_progress_bar()
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    return RTLModel.from_pretrained(name, revision=revision, token=token)


def check_name(name: str, *, revision: str | None = None) -> None:
    """Raises `ValueError` unless `name` is a folder or could be that of a repo, which alone has revisions."""
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"--revision {revision} is of a repo, but {name!r} is a folder: leave it out.")
    elif not _REPO_ID.fullmatch(name):
        raise ValueError(f"there is no folder {name!r}, nor is that a repo id, as 'org/name'.")
