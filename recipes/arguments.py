"""Arguments of a recipe: dataclasses filled from a YAML file, any of it overridden on the command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
