"""The `hf-rtl` command."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after an error that it has printed."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        print(f"hf-rtl {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-rtl", description="Look at and work with models made of sparse tickets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show a saved model's routes, densities and sizes")
    inspect.add_argument("path", type=Path, metavar="PATH", help="a folder written by save_pretrained")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    inspect.set_defaults(run=run_inspect)
    return parser


def run_inspect(args: argparse.Namespace) -> None:
    status = load_model(args.path).status()
    print(json.dumps(status, indent=2, default=str) if args.json else format_status(status))


def load_model(path: Path) -> Any:
    """The routed model in the folder `path`."""
    # Imported here, so that `hf-rtl --help` does not wait for torch.
    from transformers.utils import logging

    from hf_rtl import RTLModel

    if not (path / "config.json").is_file():
        raise ValueError(f"PATH must be a folder with a config.json, as save_pretrained writes it, got {str(path)!r}.")
    logging.disable_progress_bar()
    return RTLModel.from_pretrained(path)


def format_status(status: dict[str, Any]) -> str:
    """`status` as text: one table of its plain values, then a titled one for every dict or list of dicts in it."""
    plain: dict[str, Any] = {}
    tables: list[str] = []
    for name, value in status.items():
        if isinstance(value, dict) and value:
            tables.append(f"{name}\n{_key_values(value)}")
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append(f"{name}\n{tabulate(value, headers='keys', intfmt=',', floatfmt='.4g')}")
        else:
            plain[name] = value
    if plain:
        tables.insert(0, _key_values(plain))
    return "\n\n".join(tables)


def _key_values(values: dict[str, Any]) -> str:
    return tabulate([(name, _cell(value)) for name, value in values.items()], tablefmt="plain", disable_numparse=True)


def _cell(value: Any) -> str:
    # bool is an int, and has no thousands to separate.
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)
