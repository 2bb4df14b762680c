"""Python environments with the dependencies of hf_rtl, but without the hf_rtl that is installed here."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

from tests.hub.processes import client_environment


class Environment:
    """
    An environment in a new folder. It can import all packages of this environment except those in editable mode, since
    it does not read the files that name their sources.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        (self.site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    def run(self, *arguments: str | Path, url: str, folder: Path, **variables: str) -> str:
        """The output of the interpreter, run in `folder`, with a client that knows only the Hub at `url`."""
        folder.mkdir(parents=True, exist_ok=True)
        # Isolated mode (-I) ignores PYTHONPATH and the script's folder, in which hf_rtl may lie.
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
        """Installs a package without its dependencies."""
        _pip("install", "--no-deps", "--target", self.site_packages, wheel)


def backbone_packages(project: Path) -> list[Path]:
    return [file.parent for file in project.glob("hf_rtl*/__init__.py")]


def build_wheel(project: Path, folder: Path) -> Path:
    """Builds the package of a project in `folder`, without writing into the project."""
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
