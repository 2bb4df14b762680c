"""`hf-rtl push`: a saved model's folder, as it is, in one commit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from hf_rtl.data.rules import remove_unfitting_rule
from hf_rtl.model_card import write_card
from hf_rtl.modeling.files import write_bytes
from hf_rtl.modeling.hub import CARD_FILE, MODEL_FILES, WEIGHT_FILES, push, read_card

from .models import load_model, model_files, saved_form


def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {args.folder!r}.")
    # Before anything is sent: is it a model, and whole?
    model = load_model(args.folder)
    files = model_files(folder)
    left_out = sorted({file.name for file in folder.iterdir()} - {file.name for file in files})
    if left_out:
        print(f"Left out, as no part of the model: {', '.join(left_out)}", file=sys.stderr)
    card = folder / CARD_FILE
    if not card.is_file():
        print(f"There is no README.md, the model's page; `hf-rtl card {args.folder}` writes one.", file=sys.stderr)
    sent: dict[str, bytes | None] = {}

    def stage(staging: Path, repo_id: str, head: str | None) -> None:
        staging.mkdir()
        for file in files:
            if not (args.compact and WEIGHT_FILES.fullmatch(file.name)):
                (staging / file.name).symlink_to(file.resolve())
        if args.compact:
            model.save_pretrained(staging, **{**saved_form(args.folder), "compact": True})
        remove_unfitting_rule(staging, model.route_names)
        remote = read_card(repo_id, head, token=args.token)
        if remote or card.is_file():
            # Only the generated part of the card on the Hub is brought up to date: its authors wrote the rest.
            try:
                write_card(staging, remote=remote, model_id=repo_id)
            except ValueError as error:  # the card was changed by hand here and there
                raise ValueError(str(error).replace(str(staging), args.folder)) from error
        sent.update({file.name: None for file in staging.iterdir()})
        if card.is_file():
            sent[CARD_FILE] = (staging / CARD_FILE).read_bytes()

    try:
        repo_id, commit = push(
            stage,
            args.repo,
            outdated=MODEL_FILES,
            private=args.private,
            token=args.token,
            revision=args.revision,
            create_pr=args.create_pr,
            parent_commit=None,
            commit_message=args.message,
        )
    except HTTPError as error:  # there is no connection
        raise OSError(str(error)) from error
    except RuntimeError as error:  # an upload failed; its cause says why
        raise OSError(f"{error} {error.__cause__}") from error
    if content := sent.get(CARD_FILE):
        # The next push then knows what was changed here since.
        write_bytes(card, content)
    return {
        "repo": repo_id,
        "url": commit.pr_url or commit.commit_url,
        "commit": commit.oid,
        "files": sorted(sent),
        "left_out": left_out,
    }


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    return values["url"]
