"""`hf-rtl card`: writes or updates the card of a model."""

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
    load_model(args.model, revision=args.revision, token=args.token)  # raises if it is no model
    folder = Path(args.model)
    if folder.is_dir():
        return {"file": str(write_card(folder, _make_folder(args.out or folder)))}
    # The card is made from the files that the Hub has now: its README.md and the record of its run.
    pulled = snapshot_download(
        args.model, revision=args.revision, token=args.token, allow_patterns=CARD_SOURCES, ignore_patterns=["*/*"]
    )
    with contextlib.ExitStack() as stack:
        target = _make_folder(args.out or stack.enter_context(tempfile.TemporaryDirectory()))
        card = Path(pulled, CARD_FILE)
        if card.is_file() and not (target / card.name).exists():
            shutil.copy(card, target / card.name)
        file = write_card(pulled, target, model_id=args.model)
        return {"card": file.read_text()} if args.out is None else {"file": str(file)}


def _make_folder(folder: str | Path) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    return values.get("card") or values["file"]
