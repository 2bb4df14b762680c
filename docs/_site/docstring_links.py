"""An extension of Griffe: [`RTLModel`] in a docstring becomes a link to its place in the reference."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe


PACKAGE = Path(__file__).parents[2] / "hf_rtl" / "__init__.py"
_NAME = re.compile(r"\[(`([\w.]+)`)\](?![\[(])")


def public_names() -> set[str]:
    """`hf_rtl.__all__`, without importing torch."""
    for node in ast.parse(PACKAGE.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{PACKAGE} has no `__all__`")


class DocstringLinks(griffe.Extension):
    """Links names of `hf_rtl.__all__` and their members; other names lose the brackets."""

    def __init__(self) -> None:
        self.names = public_names()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _NAME.sub(self._link, obj.docstring.value)

    def _link(self, name: re.Match[str]) -> str:
        public = name[2].partition(".")[0] in self.names
        return f"[{name[1]}][hf_rtl.{name[2]}]" if public else name[1]
