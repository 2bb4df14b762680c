"""How a recipe starts: its arguments, from a YAML file and the command line, and what it prints meanwhile."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import HfArgumentParser


def parse(classes: Sequence[type], *, description: str, defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """
    Instances of `classes`: field defaults, then those of the recipe, then `--config FILE`, then the command line.

    Raises:
        SystemExit: an argument or a key of the file that does not exist, with the closest that does.
    """
    parser = HfArgumentParser(
        list(classes), description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the arguments below")
    known = {action.dest: action for action in parser._actions}
    for action in known.values():
        # What the file gives need not be given again on the command line.
        action.required = False
    parser.set_defaults(**(defaults or {}))
    config = parser.parse_known_args()[0].config
    if config is not None:
        values = yaml.safe_load(config.read_text()) or {}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                parser.error(
                    f"{config} has the unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else ''}"
                )
        parser.set_defaults(**values)
    arguments = vars(parser.parse_args())
    return tuple(
        cls(**{name: arguments[name] for name in cls.__dataclass_fields__ if name in arguments}) for cls in classes
    )


def chosen_methods(methods: Sequence[str], known: Sequence[str]) -> list[str]:
    """
    What --methods names, in the order of `known`.

    Raises:
        SystemExit: a method that is not known.
    """
    unknown = [method for method in methods if method not in known]
    if unknown:
        raise SystemExit(f"--methods has {unknown[0]!r}; allowed are {', '.join(map(repr, known))}.")
    return [method for method in known if method in methods]


def set_up(threads: int | None) -> None:
    """Warnings in one line each, no bars of transformers' own, and a number of CPU threads, if one is given."""
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if threads is not None:
        torch.set_num_threads(threads)
