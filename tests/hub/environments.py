"""Python environments that have what hf_rtl needs, but not hf_rtl as it is installed here."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

from tests.hub.processes import client_environment


class Environment:
    """
    An environment in a new folder, in which all packages of this one can be imported except those that are installed
    in editable mode, as this one's files that name their sources are not read.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        (self.site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def run(self, *arguments: str | Path, url: str, folder: Path, **variables: str) -> str:
        """What the interpreter prints, in `folder`, with a client that knows no other Hub than the one at `url`."""
        folder.mkdir(parents=True, exist_ok=True)
        # Isolated: neither PYTHONPATH nor the script's folder is searched, where hf_rtl may lie.
        result = subprocess.run(
            [self.python, "-I", *arguments],
            env=client_environment(url, cache=folder / "cache", **variables),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        return result.stdout

    def install(self, wheel: Path) -> None:
        """Installs a package, without what it depends on."""
        _pip("install", "--no-deps", "--target", self.site_packages, wheel)


def backbone_packages(project: Path) -> list[Path]:
    return [file.parent for file in project.glob("hf_rtl*/__init__.py")]


def build_wheel(project: Path, folder: Path) -> Path:
    """Builds the package of a project in `folder`, and leaves nothing in the project's."""
    sources = folder / "sources"
    for package in backbone_packages(project):
        shutil.copytree(package, sources / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, sources)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(command: str, *arguments: str | Path) -> None:
    quietly = ("--quiet", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *quietly, *arguments], check=True)
