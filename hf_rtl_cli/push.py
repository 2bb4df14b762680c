"""`hf-rtl push`: a saved model's folder, as it is, in one commit."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError

from hf_rtl.data.rules import remove_unfitting_rule
from hf_rtl.model_card import write_card
from hf_rtl.modeling.files import write_bytes
from hf_rtl.modeling.hub import CARD_FILE, MODEL_FILES, WEIGHT_FILES, branch_head, commit_folder, read_card

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
    if not (folder / CARD_FILE).is_file():
        print(f"There is no README.md, the model's page; `hf-rtl card {args.folder}` writes one.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as staging:
        for file in files:
            if not (args.compact and WEIGHT_FILES.fullmatch(file.name)):
                (Path(staging) / file.name).symlink_to(file.resolve())
        if args.compact:
            model.save_pretrained(staging, **{**saved_form(args.folder), "compact": True})
        remove_unfitting_rule(Path(staging), model.route_names)
        repo_id, commit = _pushed(Path(staging), args, with_card=(folder / CARD_FILE).is_file())
        if (folder / CARD_FILE).is_file():
            # With the next push it is known what was changed here since.
            write_bytes(folder / CARD_FILE, (Path(staging) / CARD_FILE).read_bytes())
        sent = sorted(file.name for file in Path(staging).iterdir())
    return {
        "repo": repo_id,
        "url": commit.pr_url or commit.commit_url,
        "commit": commit.oid,
        "files": sent,
        "left_out": left_out,
    }


def _pushed(staging: Path, args: argparse.Namespace, *, with_card: bool) -> tuple[str, CommitInfo]:
    """The repository's name and the commit that adds the files of `staging`, with a page if there is one already."""
    try:
        repo_id = HfApi().create_repo(args.repo, private=args.private, token=args.token, exist_ok=True).repo_id
        head = branch_head(repo_id, None if args.create_pr else args.revision, token=args.token)
        remote = read_card(repo_id, head, token=args.token)
        if remote or with_card:
            # Only our part of the page on the Hub is brought up to date: the rest belongs to whoever wrote it.
            write_card(staging, remote=remote, model_id=repo_id)
        commit = commit_folder(
            staging,
            repo_id,
            outdated=MODEL_FILES,
            parent_commit=head,
            revision=args.revision,
            token=args.token,
            create_pr=args.create_pr,
            commit_message=args.message,
        )
    except OSError:  # errors of the Hub are that too
        raise
    except HTTPError as error:  # no connection
        raise OSError(str(error)) from error
    except ValueError as error:  # of a page that was changed by hand here and there
        raise ValueError(str(error).replace(str(staging), args.folder)) from error
    except RuntimeError as error:  # an upload that failed; its cause says why
        raise OSError(f"{error} {error.__cause__}") from error
    return repo_id, commit


def text(values: dict[str, Any], args: argparse.Namespace) -> str:
    return values["url"]
