"""`hf-rtl card`: the page of a model."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_rtl.model_card import write_card
from hf_rtl.modeling.hub import CARD_FILE

from .models import CARD_SOURCES, load_model


def run(args: argparse.Namespace) -> dict[str, Any]:
    load_model(args.model, revision=args.revision, token=args.token)  # is it one?
    folder = Path(args.model)
    if folder.is_dir():
        return {"file": str(write_card(folder, _made(args.out or folder)))}
    # As pulled a moment ago, with its own page and what it says of its run.
    pulled = snapshot_download(
        args.model, revision=args.revision, token=args.token, allow_patterns=CARD_SOURCES, ignore_patterns=["*/*"]
    )
    with contextlib.ExitStack() as stack:
        target = _made(args.out or stack.enter_context(tempfile.TemporaryDirectory()))
        page = Path(pulled, CARD_FILE)
        if page.is_file() and not (target / page.name).exists():
            shutil.copy(page, target / page.name)
        file = write_card(pulled, target, model_id=args.model)
        return {"card": file.read_text()} if args.out is None else {"file": str(file)}


def _made(folder: str | Path) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    return values.get("card") or values["file"]
