"""
The documentation: every Python block runs, and every command of the tutorial; every relative link leads somewhere, the
reference is complete.
"""

import contextlib
import dataclasses
import doctest
import io
import pydoc
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import hf_rtl
from hf_rtl.modeling import modeling_rtl
from hf_rtl_cli.main import main
from tests.modeling.small_backbones import units_found_once


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/*.md")])
SET_UP = ROOT / "docs" / "how-to" / "index.md"
RUN = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page != SET_UP]
REFERENCE = ROOT / "docs" / "reference"
NAVIGATION = ROOT / "mkdocs.yml"

# Parts of code that make runs longer than a test needs, and what is run in their place.
SHORTER = {
    "README.md": {"range(400)": "range(10)"},  # tests/test_quick_start.py runs it in full
    "docs/tutorial.md": {
        "range(1200)": "range(1050, 1200)",
        "range(1200, 1797)": "range(1200, 1260)",
        "extraction_steps=20": "extraction_steps=2",
        "max_steps=120": "max_steps=5",
        "--extraction_steps 20 --max_steps 120": "--extraction_steps 2 --max_steps 2",
    },
}

_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _blocks(text: str) -> list[tuple[str, str]]:
    """(info string, code) of every fence; line numbers of the code are those of the page."""
    return [
        (fence[1].strip(), "\n" * text[: fence.start(2)].count("\n") + fence[2]) for fence in _FENCE.finditer(text)
    ]


def _run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `hf-rtl` or a recipe in this process, which has imported everything."""
    program, *arguments = shlex.split(line)
    if program == "hf-rtl":
        assert main(arguments) == 0
    else:
        assert program == "python"
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def _prose(text: str) -> str:
    return _FENCE.sub("", text)


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ +(.*)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _run_blocks(page: Path, namespace: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    for part, shorter in SHORTER.get(_id(page), {}).items():
        assert text.count(part) == 1, f"{_id(page)} has no {part!r}, or several"
        text = text.replace(part, shorter)
    for info, code in _blocks(text):
        assert info in ("", "python", "python no-run", "bash"), f"{_id(page)} has a block fenced as {info!r}"
        with contextlib.redirect_stdout(io.StringIO()), units_found_once(modeling_rtl):
            if info.startswith("python"):
                compiled = compile(code, str(page), "exec")
                if info == "python":
                    exec(compiled, namespace)
            elif info == "bash" and page.name == "tutorial.md":
                for line in code.strip().splitlines():
                    _run_command(line, monkeypatch)


@pytest.fixture(scope="module")
def set_up(tmp_path_factory):
    """The names and the folder that the set-up of the how-to pages leaves; every page gets a copy."""
    folder, namespace = tmp_path_factory.mktemp("set-up"), {"__name__": "docs_set_up"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _run_blocks(SET_UP, namespace, patch)
    return namespace, folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=_id)
def test_blocks_run(page, tmp_path, monkeypatch, request):
    namespace = {"__name__": f"docs_{page.stem}"}
    if page.parent == SET_UP.parent:
        names, folder = request.getfixturevalue("set_up")
        namespace = {**names, **namespace}
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _run_blocks(page, namespace, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in _LINK.findall(_prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
            broken.append(target)
    assert not broken


def test_reference_names_everything_public():
    """Lines such as `::: hf_rtl.RTLModel`, where the site has the docstring."""
    shown = [line for page in REFERENCE.glob("*.md") for line in page.read_text().splitlines()]
    assert [name for name in hf_rtl.__all__ if f"::: hf_rtl.{name}" not in shown] == []


def test_reference_shows_only_what_exists():
    for page in REFERENCE.glob("*.md"):
        for name in re.findall(r"^::: (.*)$", page.read_text(), re.MULTILINE):
            assert pydoc.locate(name).__doc__, f"{_id(page)} has {name}"


def test_reference_names_every_training_argument():
    text = (REFERENCE / "arguments.md").read_text()
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(hf_rtl.RTLTrainingArguments) if field.name not in known]
    assert own
    assert [name for name in own if f"`{name}`" not in text] == []


def test_settings_of_runs_are_those_of_their_configurations():
    """The table in docs/how-to/choose-learning-rate-and-sparsity.md, whose columns are arguments."""
    page = SET_UP.with_name("choose-learning-rate-and-sparsity.md")
    lines = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    names = [name.strip("`") for name in lines[0][1:]]
    runs = [line for line in lines if "recipes/configs/" in line[0]]
    assert names[0] == "learning_rate" and len(runs) >= 6
    for first, *settings in runs:
        configuration = yaml.safe_load((page.parent / _LINK.search(first)[1]).read_text())
        assert dict(zip(names, settings, strict=True)) == {name: str(configuration[name]) for name in names}


def test_navigation_has_every_page_once():
    """A page of docs/ or a card that is missing in mkdocs.yml would be one that nobody finds."""
    patterns = ("docs/**/*.md", "model_cards/*.md", "CHANGELOG.md", "CONTRIBUTING.md")
    addresses = [_id(page).removeprefix("docs/") for pattern in patterns for page in ROOT.glob(pattern)]
    navigation = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", NAVIGATION.read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted(addresses)


def test_examples_of_the_task_classes_run():
    results = doctest.testmod(modeling_rtl)
    assert results.attempted >= 8 and results.failed == 0
