"""
A hook of MkDocs: what lies outside docs/ and belongs to the site.

Links of a page are those that GitHub follows, from the file's place in the repository. Here they lead to the pages of
the site. Model cards and the pages at the repository's top are pages of the site at the same path, README.md as
overview.md, since MkDocs takes it for an index; other files that a page links to are shown as code, below source/.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CARDS = ROOT / "model_cards"
README = ROOT / "README.md"
TOP = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".html": "html", ".css": "css"}

_FENCE = re.compile(r"(^```.*\n(?:.*\n)*?```$)", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the model cards with all that is beside them, the pages at the top, and the files that pages link to."""
    own = [*TOP, *(file for file in CARDS.iterdir() if file.is_file())]
    for file in own:
        inclusion = InclusionLevel.NOT_IN_NAV if file == README else InclusionLevel.UNDEFINED
        files.append(File.generated(config, _address(file), abs_src_path=str(file), inclusion=inclusion))
    pages = [file for file in [*own, *DOCS.rglob("*")] if file.suffix == ".md"]
    linked = {target for page in pages for target in _targets(page)}
    inside = {file for folder in linked if folder.is_dir() for file in folder.iterdir() if file.is_file()}
    for target in linked | inside:
        if _address(target).startswith("source/"):
            content = _listing(target) if target.is_dir() else _code(target)
            page = File.generated(config, _address(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes the links of a page lead to pages of the site."""
    if page.file.abs_src_path is None:  # shown as code
        return markdown
    file, folder = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def site_link(link: re.Match[str]) -> str:
        target = _target(file, link[1])
        return posixpath.relpath(_address(target), folder) if target.exists() else link[1]

    parts = _FENCE.split(markdown.replace("```python no-run", "```python"))
    return "".join(part if part.startswith("```") else _LINK.sub(site_link, part) for part in parts)


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _targets(page: Path) -> Iterator[Path]:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if (target := _target(page, link)).exists():
            yield target


def _address(file: Path) -> str:
    """Where the site has a file of the repository."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    if file == README:
        return "overview.md"
    path = file.relative_to(ROOT).as_posix()
    if file in TOP or file.parent == CARDS:
        return path
    return f"source/{path}/index.md" if file.is_dir() else f"source/{path}.md"


def _listing(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    return _source_page(folder, "\n".join(f"- [{name}]({name}.md)" for name in names))


def _code(file: Path) -> str:
    fence = "`" * 5
    return _source_page(file, f"{fence}{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}\n{fence}")


def _source_page(path: Path, text: str) -> str:
    return f"---\nsearch:\n  exclude: true\n---\n# {path.relative_to(ROOT).as_posix()}\n\n{text}\n"
