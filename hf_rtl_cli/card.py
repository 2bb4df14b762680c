"""`hf-rtl card`: the page of a model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from hf_rtl.model_card import write_card

from .models import load_model


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.model, revision=args.revision, token=args.token)
    folder = Path(args.model)
    if folder.is_dir():
        target = folder if args.out is None else Path(args.out)
        target.mkdir(parents=True, exist_ok=True)
        return {"file": str(write_card(folder, target))}
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return {"file": str(write_card(model, args.out, model_id=args.model))}
    with tempfile.TemporaryDirectory() as beside:
        return {"card": write_card(model, beside, model_id=args.model).read_text()}


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    return values.get("card") or values["file"]
