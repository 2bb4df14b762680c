"""The arguments of `hf-rtl`, and the call of its commands."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

from .tables import encodable, printable


# An option with one or more values, which may also be given more than once.
_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend"}


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command and returns its exit status: 0, or 1 after an error, which is printed. Wrong usage exits with 2.

    Each command is a module of the same name in this package, with two functions: `run(args)` returns the plain values
    that `--json` prints, and `text(values, args)` formats them for people.
    """
    args = build_parser().parse_args(argv)
    try:
        # Libraries may print to standard output, but only the answer belongs there.
        with contextlib.redirect_stdout(sys.stderr):
            command = importlib.import_module(f"hf_rtl_cli.{args.command}")
            values = command.run(args)
            answer = json.dumps(values, indent=2, allow_nan=False) if args.json else command.text(values, args)
        print(encodable(answer, sys.stdout.encoding or "utf-8"), flush=True)
    except BrokenPipeError:
        # The reader, for example `head`, has closed the pipe. Without this, Python would print an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        message = printable(" ".join(str(error).split()))
        print(encodable(f"{args.prog}: error: {message}", sys.stderr.encoding or "utf-8"), file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-rtl",
        description="Inspect, export and share models of sparse tickets (subnetworks, one per route of the data).",
        epilog=_examples("hf-rtl inspect org/name", "hf-rtl export runs/digits/final --route 3 ticket-3"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_rtl {importlib.metadata.version('hf_rtl')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_similarity, _add_predict, _add_export, _add_card, _add_push, _add_tickets):
        add(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = _add_command(
        commands,
        "inspect",
        "show a model's description, routes, mask densities, ticket similarities and size in bytes",
        "hf-rtl inspect runs/digits/final",
        "hf-rtl inspect org/name --revision v1 --route cat",
        "hf-rtl inspect org/name --json | jq .footprint.compact_bytes",
    )
    _add_model(inspect)
    inspect.add_argument("--route", metavar="NAME", help="show the density of this route's ticket in each weight")
    _add_all(inspect)


def _add_similarity(commands: argparse._SubParsersAction) -> None:
    similarity = _add_command(
        commands,
        "similarity",
        "show how similar the tickets of a model are, compared with chance",
        "hf-rtl similarity runs/digits/final --per-layer",
        "hf-rtl similarity org/name --plot similarity.png --csv similarity.csv",
    )
    _add_model(similarity)
    similarity.add_argument("--per-layer", action="store_true", help="also show the similarity in each weight tensor")
    similarity.add_argument("--plot", metavar="FILE", help="draw a PNG: pairs, or with --per-layer weight tensors")
    similarity.add_argument(
        "--csv", metavar="FILE", help="write one line per pair, with --per-layer per pair and weight tensor"
    )
    _add_all(similarity)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = _add_command(
        commands,
        "predict",
        "answer images, audio files or texts with the tickets of a model that classifies them",
        "hf-rtl predict runs/digits/final one.png two.png",
        "hf-rtl predict org/name review.txt --route books --json",
    )
    _add_model(predict)
    predict.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="as the model takes: images, audio (wav, flac, ogg, …), or UTF-8 files, each of which is one text",
    )
    predict.add_argument(
        "--route",
        metavar="NAME",
        help="route of the ticket that answers; default: the model's router finds it for each file; if the model has "
        "none, all membership tickets are asked, and the one with the highest score is shown",
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = _add_command(
        commands,
        "export",
        "write one ticket as a plain model, which does not need hf_rtl",
        "hf-rtl export org/name --route cat cat",
        "hf-rtl export languages --route french french --small",
        "hf-rtl export runs/digits/final --route 3 three --format onnx --input pixel_values=2x1x8x8",
    )
    _add_model(export)
    export.add_argument("--route", metavar="NAME", required=True, help="route of the ticket")
    export.add_argument(
        "--format",
        choices=["folder", "onnx", "torch-export"],
        default="folder",
        help="folder (default): for from_pretrained; onnx: a graph, model.onnx; torch-export: a graph, model.pt2",
    )
    export.add_argument(
        "--prune-structure", action="store_true", help="remove channels that change no output; for graphs only"
    )
    export.add_argument(
        "--small", action="store_true", help="remove whole neurons and channels that the ticket does not use"
    )
    export.add_argument(
        "--input",
        metavar="NAME=SIZES",
        action="append",
        help="name and sizes of a graph input, such as pixel_values=2x3x32x32; default: as the saved processor makes "
        "them, or from the configuration",
    )
    _add_new_folder(export)


def _add_card(commands: argparse._SubParsersAction) -> None:
    card = _add_command(
        commands,
        "card",
        "write or update the card of a model, README.md; text that you wrote in it stays",
        "hf-rtl card runs/digits/final",
        "hf-rtl card org/name > README.md",
    )
    _add_model(card)
    card.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder for README.md; default: the model's folder; the card of a repo is printed",
    )


def _add_push(commands: argparse._SubParsersAction) -> None:
    push = _add_command(
        commands,
        "push",
        "check a saved model, push its folder to the Hub in one commit, and print the URL",
        "hf-rtl push runs/digits/final org/digits-tickets --private",
        "hf-rtl push runs/digits/final org/digits-tickets --compact --create-pr",
    )
    push.add_argument("folder", metavar="FOLDER", help="a folder written by save_pretrained")
    push.add_argument("repo", metavar="REPO", help="a repo id such as org/name; created if missing")
    push.add_argument("--private", action="store_true", default=None, help="make the repo private if it is created")
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch; created if missing")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")
    push.add_argument("--compact", action="store_true", help="leave out the weights that no ticket keeps")
    push.add_argument("--message", metavar="TEXT", default="Upload model", help="commit message")
    _add_token(push)


def _add_tickets(commands: argparse._SubParsersAction) -> None:
    summary = "find, list, add, drop or save single tickets of a model"
    tickets = commands.add_parser("tickets", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    actions = tickets.add_subparsers(dest="action", required=True, metavar="ACTION")

    _add_find(actions)
    show = _add_command(
        actions,
        "list",
        "list the tickets of a model, or those in ticket files",
        "hf-rtl tickets list runs/digits/final",
        "hf-rtl tickets list ann/more-digits",
    )
    show.add_argument("source", metavar="PATH", help="folder or repo id of a model or of ticket files")
    _add_hub(show)
    _add_all(show)

    add = _add_command(
        actions,
        "add",
        "add tickets from ticket files to the model that they were made for, their base",
        "hf-rtl tickets add runs/digits/final ann/more-digits --route ten",
        "hf-rtl tickets add org/digits-tickets ann/more-digits --rename 3=three --out digits-and-more",
    )
    _add_model(add)
    add.add_argument("tickets", metavar="TICKETS", help="folder or repo id of ticket files, written by save_tickets")
    add.add_argument("--route", metavar="NAME", **_SEVERAL, help="routes of the tickets to add; default: all")
    add.add_argument(
        "--rename", metavar="OLD=NEW", **_SEVERAL, help="new names for routes that the model already has, or auto"
    )
    add.add_argument("--tickets-revision", metavar="REV", help="branch, tag or commit of TICKETS")
    _add_out(add)

    drop = _add_command(
        actions,
        "drop",
        "remove tickets from a model",
        "hf-rtl tickets drop runs/digits/final --route 3 8",
    )
    _add_model(drop)
    drop.add_argument("--route", metavar="NAME", **_SEVERAL, required=True, help="routes of the tickets to remove")
    _add_out(drop)

    save = _add_command(
        actions,
        "save",
        "write tickets of a model as ticket files, for people who have the same model",
        "hf-rtl tickets save runs/digits/final digits-tickets --route 3 8",
    )
    _add_model(save)
    save.add_argument("--route", metavar="NAME", **_SEVERAL, help="routes of the tickets to write; default: all")
    _add_new_folder(save)


def _add_find(actions: argparse._SubParsersAction) -> None:
    find = _add_command(
        actions,
        "find",
        "find a ticket per route of a trained model in one pass over data, without training",
        "hf-rtl tickets find org/bert texts.parquet domains --route-column domain --sparsity 0.5",
        "hf-rtl tickets find gpt2 texts/ languages --route-column language --sparsity 0.3 --refit",
    )
    _add_model(find)
    find.add_argument(
        "data", metavar="DATA", help="a parquet, CSV or JSON lines file, a folder of these, or a Hub data set"
    )
    find.add_argument("--route-column", metavar="NAME", required=True, help="column of the route of a sample")
    find.add_argument("--sparsity", type=float, required=True, help="share of units that is removed, such as 0.5")
    find.add_argument("--granularity", default="neuron", help="neuron (default), channel or weight")
    find.add_argument("--criterion", default="activity", help="activity (default), magnitude or random")
    find.add_argument("--refit", action="store_true", help="solve anew, by least squares, what reads the units left")
    find.add_argument("--round-to", type=int, default=8, help="layers keep a multiple of this number; default: 8")
    find.add_argument("--num-batches", type=int, default=8, help="batches of each route; default: 8")
    find.add_argument("--batch-size", type=int, default=16, help="samples of a batch; default: 16")
    find.add_argument("--split", default="train", help="split of a folder or data set; default: train")
    find.add_argument("--text-column", default="text", metavar="NAME", help="column of texts; default: text")
    find.add_argument("--max-length", type=int, default=128, help="tokens of a text; default: 128")
    find.add_argument("--image-column", default="image", metavar="NAME", help="column of images; default: image")
    find.add_argument("--seed", type=int, default=0, help="which samples are drawn; default: 0")
    _add_new_folder(find)


def _add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, *examples: str
) -> argparse.ArgumentParser:
    """A parser for a command with a `summary` of one line."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.set_defaults(prog=command.prog)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="a folder written by save_pretrained, or a repo id such as org/name"
    )
    _add_hub(command)


def _add_hub(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repo; default: its main branch")
    _add_token(command)


def _add_token(command: argparse.ArgumentParser) -> None:
    command.add_argument("--token", help="Hub access token; default: $HF_TOKEN, or the one of `hf auth login`")


def _add_new_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", metavar="OUT", help="a new or empty folder")
    command.add_argument("--force", action="store_true", help="write into OUT even if it is not empty")


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", metavar="DIR", help="a new folder for the changed model; default: MODEL, if it is a folder"
    )


def _add_all(command: argparse.ArgumentParser) -> None:
    command.add_argument("--all", action="store_true", help="show long lists completely")


def _examples(*calls: str) -> str:
    return "\n".join(["examples:", *(f"  {call}" for call in calls)])
