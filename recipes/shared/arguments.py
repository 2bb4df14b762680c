"""The start and the end of a recipe: its arguments, from a YAML file and the command line, its output, Ctrl-C."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_rtl.modeling.files import write_json
from hf_rtl.training.run_directory import OtherRunError


class BadInput(ValueError):
    """Arguments or data of the caller that a recipe cannot use. `run_main` shows it in one line."""


class Parser(HfArgumentParser):
    """A parser that refuses arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and leaves the lines of the description as they are."""


def parse(classes: Sequence[type], *, description: str, defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """
    Instances of `classes`: field defaults, overridden by `defaults`, by `--config FILE` and by the command line.
    `--help` shows all but the arguments of `TrainingArguments`, in a group for each class.

    Raises:
        SystemExit: an argument or a key of the file is unknown or has a wrong value, or the file cannot be read. The
            message names the closest known key.
    """
    usage = "%(prog)s [--config FILE] [--ARGUMENT VALUE …]"
    parser = Parser(list(classes), description=description, formatter_class=_HelpFormatter, usage=usage)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the arguments below")
    parser.add_argument(
        "--help_all", action="help", help="also show what every Trainer has, such as --output_dir and --learning_rate"
    )
    _group(parser, classes)
    known = {action.dest: action for action in parser._actions}
    for action in known.values():
        # A required argument may come from the file.
        action.required = False
    parser.set_defaults(**(defaults or {}))
    config = parser.parse_known_args()[0].config
    if config is not None:
        try:
            values = yaml.safe_load(config.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config} cannot be read: {error}")
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                parser.error(
                    f"{config} has the unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else ''}"
                )
        parser.set_defaults(**values)
    arguments = vars(parser.parse_args())
    try:
        return tuple(
            cls(**{name: arguments[name] for name in cls.__dataclass_fields__ if name in arguments}) for cls in classes
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _group(parser: Parser, classes: Sequence[type]) -> None:
    """Moves the arguments of every class into a group of the help, and hides those of `TrainingArguments`."""
    general = parser._action_groups[1]._group_actions
    inherited = {field.name for field in fields(TrainingArguments)}
    for cls in classes:
        names = {field.name for field in fields(cls)}
        group = parser.add_argument_group(cls.__name__)
        own = [action for action in general if action.dest in names - inherited]
        group._group_actions.extend(own)
        general[:] = [action for action in general if action not in own]
    for action in general:
        if action.dest in inherited and "--help_all" not in sys.argv:
            action.help = argparse.SUPPRESS


def run_main(main: Callable[[], None]) -> None:
    """
    Runs a recipe that trains. Input that it cannot use ends it with one line, and with the exit code 2; Ctrl-C with
    one line that says how to go on, and with the exit code 130.
    """
    try:
        main()
    except (BadInput, OtherRunError) as error:
        # A worker that reads samples repeats the error at the end of its traceback.
        lines = str(error).rpartition("BadInput: ")[2].split("\n")
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(filter(None, map(str.strip, lines)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "Stopped. Run the same command again to go on.", file=sys.stderr)
        sys.exit(130)


def check_same(file: Path, given: Mapping[str, Any], *, kind: str) -> None:
    """
    Raises `BadInput` if the file has other arguments than those that are `given`, since results would be read back.
    Writes them into it if there is none. `kind`: what the folder of the file has.
    """
    given = json.loads(json.dumps(given))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, given)
    saved = json.loads(file.read_text())
    other = [f"--{name} {saved.get(name)}" for name, value in given.items() if saved.get(name) != value]
    if other:
        raise BadInput(
            f"--output_dir {str(file.parent)!r} has {kind} with {', '.join(other)}; choose another folder, or give "
            "these."
        )


def chosen_methods(methods: Sequence[str], known: Sequence[str]) -> list[str]:
    """
    The methods that --methods names, in the order of `known`.

    Raises:
        SystemExit: a method is unknown.
    """
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise SystemExit(f"--methods has {unknown[0]!r}; allowed are {', '.join(map(repr, known))}.")
    return [method for method in known if method in methods]


def set_up(threads: int | None) -> None:
    """Logs warnings in one line each, hides the progress bars of transformers, and sets the number of CPU threads."""
    transformers.utils.logging.disable_progress_bar()
    # What cannot be read is said by `BadInput`.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
