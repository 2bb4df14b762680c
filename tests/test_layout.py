"""The layout of the code: imports between rooms, no circles, no long files or functions, two levels of classes."""

import ast
import inspect
import io
import textwrap
import tokenize
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from hf_rtl import RTLModel, RTLTrainer
from hf_rtl.modeling.routed_model import RoutedModel
from hf_rtl.training.route_trainer import RouteTrainer


ROOT = Path(__file__).resolve().parents[1]
# A room imports itself and the rooms before it.
ROOMS = ("modeling", "data", "hall", "model_card", "training")
LONGEST_FILE, LONGEST_FUNCTION = 450, 60  # lines of code


def list_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = list_files("hf_rtl")
ALL = [*LIBRARY, *list_files("hf_rtl_cli", "recipes")]


@cache
def parse_file(path):
    return ast.parse(path.read_text())


@cache
def code_lines(path):
    """Numbers of the lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parse_file(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def find_room(path):
    first = path.relative_to(ROOT / "hf_rtl").parts[0]
    return {"__init__.py": "top"}.get(first, "hall" if first.endswith(".py") else first)


def read_imports(path):
    """All imports of a library file from the library, as pairs of the imported file and the name."""
    for node in ast.walk(parse_file(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            target = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
            for alias in node.names:
                yield module_file(target, alias.name), alias.name


def module_file(target, name):
    """The file that `from target import name` reads: a module of that name, or that of `target`."""
    for candidate in (target / f"{name}.py", target / name / "__init__.py", target.with_suffix(".py")):
        if candidate.exists():
            return candidate
    return target / "__init__.py"


def too_long(paths):
    """Files and functions with more lines of code than can be read at once."""
    for path in paths:
        if len(code_lines(path)) > LONGEST_FILE:
            yield f"{path.relative_to(ROOT)}: {len(code_lines(path))}"
        for node in ast.walk(parse_file(path)):
            if isinstance(node, ast.FunctionDef):
                length = len(code_lines(path) & set(range(node.lineno, node.end_lineno + 1)))
                if length > LONGEST_FUNCTION:
                    yield f"{path.relative_to(ROOT)}, {node.name}: {length}"


def test_a_room_imports_those_below_it_alone():
    up = []
    for path in LIBRARY:
        room = find_room(path)
        if room == "top":
            continue
        allowed = {room} if room == "backbones" else set(ROOMS[: ROOMS.index(room) + 1])
        for target, name in read_imports(path):
            if find_room(target) not in allowed:
                up.append(f"{path.relative_to(ROOT)} imports {name} from {target.relative_to(ROOT)}")
    assert up == []


def test_every_room_has_a_docstring():
    for room in (*ROOMS, "backbones"):
        if room != "hall":
            assert len(ast.get_docstring(parse_file(ROOT / "hf_rtl" / room / "__init__.py"))) > 100, room


def test_the_room_that_is_saved_with_models_is_flat_and_imported_with_single_dots():
    folder = ROOT / "hf_rtl" / "modeling"
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
    for path in folder.glob("*.py"):
        for node in ast.walk(parse_file(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                # transformers copies only files that it finds by `from .name import`.
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"


def test_the_package_never_imports_itself_by_its_absolute_name():
    found = []
    for path in LIBRARY:
        for node in ast.walk(parse_file(path)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(module.split(".")[0] == "hf_rtl" for module in modules):
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert found == []


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {target for target, _ in read_imports(path)} for path in LIBRARY}
    # A room's `__init__` imports its files, which do not import it.
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.slow
def test_no_private_name_is_imported_from_another_room():
    found = []
    for path in LIBRARY:
        for target, name in read_imports(path):
            if name.startswith("_") and find_room(target) != find_room(path):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    for path in ALL:
        if path in LIBRARY:
            continue
        for node in ast.walk(parse_file(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_rtl":
                found += [f"{path.relative_to(ROOT)} imports {a.name}" for a in node.names if a.name.startswith("_")]
    assert found == []


@pytest.mark.slow
def test_files_and_functions_can_be_read_at_once():
    assert list(too_long(ALL)) == []


@pytest.mark.parametrize(
    "text, expected",
    [("x = 1\n\n# y\n", 1), ('def f():\n    """One.\n\n    Two."""\n    return (\n        1\n    )\n', 4)],
)
def test_lines_of_code_leave_out_docstrings_comments_and_blank_lines(tmp_path, text, expected):
    file = tmp_path / "module.py"
    file.write_text(text)
    assert len(code_lines(file)) == expected


def own_names(cls):
    """The names that a class defines (methods, fields, attributes of `self`), and those that it reads from `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    on_self = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    defined = set(vars(cls)) | {node.attr for node in on_self if isinstance(node.ctx, ast.Store)}
    return defined, {node.attr for node in on_self if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("base, cls", [(RouteTrainer, RTLTrainer), (RoutedModel, RTLModel)])
def test_a_base_needs_nothing_of_its_subclass(base, cls):
    assert cls.__bases__ == (base,)
    defined, read = own_names(base)
    only_in_subclass = own_names(cls)[0] - defined - set(dir(base))
    assert (read | base.__annotations__.keys()) & only_in_subclass == set()


def test_a_recipe_imports_no_other_recipe():
    commands = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    for path in list_files("recipes"):
        for node in ast.walk(parse_file(path)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not commands & {module.split(".")[0] for module in modules}, path
