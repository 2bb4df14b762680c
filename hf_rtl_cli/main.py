"""What `hf-rtl` understands, and how it answers."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import textwrap

from .tables import encodable


def main(argv: list[str] | None = None) -> int:
    """
    Run the command and return its exit status: 0, or 1 after an error that it has printed. Wrong usage exits with 2.

    A command is a module here with `run(args)`, which gives the plain values that `--json` prints, and
    `text(values, args)`, which says them to people.
    """
    args = build_parser().parse_args(argv)
    try:
        # Libraries write what they like to standard output, which is for the answer alone.
        with contextlib.redirect_stdout(sys.stderr):
            command = importlib.import_module(f"hf_rtl_cli.{args.module}")
            values = command.run(args)
            answer = json.dumps(values, indent=2, allow_nan=False) if args.json else command.text(values, args)
        print(encodable(answer, sys.stdout.encoding), flush=True)
    except BrokenPipeError:
        # Who reads has seen enough, as `head`. Python is not to complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"{args.prog}: error: {encodable(_one_line(error), sys.stderr.encoding)}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-rtl",
        description="Look at models made of sparse tickets, and share them.",
        epilog=_examples("hf-rtl inspect org/name", "hf-rtl export runs/digits/final --route 3 ticket-3"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_rtl {importlib.metadata.version('hf_rtl')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_similarity(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = _add_command(
        commands,
        "inspect",
        "show what a model is, its routes, masks, their similarity, and what it costs in bytes",
        "hf-rtl inspect runs/digits/final",
        "hf-rtl inspect org/name --revision v1 --route cat",
        "hf-rtl inspect org/name --json | jq .footprint.compact_bytes",
    )
    _add_model(inspect)
    inspect.add_argument("--route", metavar="NAME", help="show the densities of this route's ticket in each weight")
    _add_all(inspect)


def _add_similarity(commands: argparse._SubParsersAction) -> None:
    similarity = _add_command(
        commands,
        "similarity",
        "show how alike the tickets of a model are, beside what is so by chance",
        "hf-rtl similarity runs/digits/final --per-layer",
        "hf-rtl similarity org/name --plot similarity.png --csv similarity.csv",
    )
    _add_model(similarity)
    similarity.add_argument("--per-layer", action="store_true", help="also in each weight")
    similarity.add_argument("--plot", metavar="FILE", help="draw it as a PNG: pairs, or with --per-layer the weights")
    similarity.add_argument("--csv", metavar="FILE", help="write a line for each pair, with --per-layer of each weight")
    _add_all(similarity)


def _add_command(
    commands: argparse._SubParsersAction, name: str, what: str, *examples: str
) -> argparse.ArgumentParser:
    """A command that the module of its name runs, and that says `what` it does in one line."""
    command = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document, for programs")
    command.set_defaults(module=name, prog=command.prog)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder written by save_pretrained, or a repo id as org/name")
    _add_hub(command)


def _add_hub(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repo; default: its main branch")
    command.add_argument("--token", help="token for the Hub; default: $HF_TOKEN, or that of `hf auth login`")


def _add_all(command: argparse.ArgumentParser) -> None:
    command.add_argument("--all", action="store_true", help="do not cut long lists")


def _examples(*calls: str) -> str:
    return textwrap.indent("\n".join(["examples:", *(f"  {call}" for call in calls)]), "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
