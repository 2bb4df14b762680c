"""The layout of recipes/ that CONTRIBUTING.md describes: which module may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.commands import RECIPES


COMMANDS = {
    *(
        "analyze",
        "baselines",
        "collapse",
        "compare",
        "domains",
        "evaluate",
        "group_classes",
        "inr",
        "languages",
        "prune",
        "speech",
        "verify",
    ),
}
ROOMS = {"shared", "pages", "benchmarks", "space"}
FILES = sorted(RECIPES.rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """The names of all modules that a file imports; a relative import keeps its dot."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_only_commands_lie_at_the_top() -> None:
    assert {file.stem for file in RECIPES.glob("*.py")} == COMMANDS
    assert {file.parent.name for file in RECIPES.glob("*/*.py")} == ROOMS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(RECIPES).as_posix())
def test_imports_lead_to_the_shared_room_alone(file: Path) -> None:
    room = file.parent.name if file.parent != RECIPES else None
    names = list(imported(file))
    roots = {name.partition(".")[0] for name in names if not name.startswith(".")}
    assert roots & (COMMANDS | ROOMS) <= ({"shared"} if room != "shared" else set())
    # Inside a room, a single dot gives a module the same name however it is started.
    assert room is not None or not any(name.startswith(".") for name in names)
    assert not any(name.startswith("..") for name in names)
    assert "sys.path" not in file.read_text()
