"""
What may come of a file of a stranger: a refusal of our kind, or what the file's own hashes say.

A refusal of our kind is a `ValueError`, `TypeError`, `OSError` or `ImportError` (these are what the docstrings of
`from_pretrained`, `load_tickets`, `load_rule`, `RunDirectory` and `write_card` name) whose message names the folder, a
file in it, or a field, key or tensor of these files. Where a docstring promises `None` for damaged files, that is a
refusal too.

Whatever comes, nothing is run: no pickle is read, no module of the folder is imported, no process started, no
connection made. Nothing is written outside the folder, and by readers not in it either. Memory grows by no more than
`MOST_BYTES` and some times the folder's size.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


REFUSALS = (ValueError, TypeError, OSError, ImportError)
MOST_BYTES, MOST_TIMES = 2**27, 50
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WORD = re.compile(r"[\w.\-]+")
_FIELD = re.compile(r"`[\w.\-\[\]*…]+`|field '\w+'")


class Broken(Exception):
    """Something came that may not come; the first argument says what."""


def is_refusal(error: BaseException, folder: Path, words: set[str]) -> bool:
    """Whether an error is of our kind. `words` are names of fields, keys and tensors."""
    if not isinstance(error, REFUSALS):
        return False
    text = str(error)
    names, found = {path.name for path in folder.rglob("*")}, {word.strip(".-") for word in _WORD.findall(text)}
    return str(folder) in text or bool(_FIELD.search(text)) or not (names | words).isdisjoint(found)


def signature(error: BaseException) -> str:
    """What tells findings apart: the error's type, and the last line of this package that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/hf_rtl/" in frame.filename] or frames
    last = frames[-1] if frames else None
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {where}, from {Path(last.filename).name if last else '?'}"


# What is executed, and written


_RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.link")
_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})


class Watch:
    """Notes what this process runs and writes, from the events that Python itself reports."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    @contextmanager
    def watching(self, allowed: Path) -> Iterator[None]:
        """Raises `Broken` at the end if anything was run, or written outside the folder `allowed`."""
        self.allowed, self.seen = allowed, []
        try:
            yield
        finally:
            self.allowed = None
        if self.seen:
            raise Broken(self.seen[0])

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _RUNS:
            self.seen.append(f"runs {event} {arguments[:1]}")
        elif event == "exec" and str(self.allowed) in getattr(arguments[0], "co_filename", ""):
            self.seen.append(f"runs {Path(arguments[0].co_filename).name}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            flags = arguments[2] or 0
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._note_change(event, arguments[0])
        elif event in _CHANGES:
            num_paths = 1 + (event in ("os.rename", "os.link"))
            for path, folder in zip(arguments[:num_paths], arguments[-num_paths:], strict=True):
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._note_change(event, path, folder)

    def _note_change(self, event: str, path: Any, folder: Any = None) -> None:
        """`folder` may be the number of an open folder, in which `path` is."""
        assert self.allowed is not None
        inside = os.readlink(f"/proc/self/fd/{folder}") if type(folder) is int and folder >= 0 else ""
        name = os.path.abspath(os.path.join(inside, os.fsdecode(path)))
        if not name.startswith((str(self.allowed), "/dev/", "/proc/", *_INSTALLED)):
            self.seen.append(f"writes outside the folder: {event} of {Path(name).name}")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path in a folder, with its size and the time of its last change."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_size if path.is_file() else 0, about.st_mtime_ns)
    return found


# Memory


def memory(name: str) -> int:
    """A number of bytes from what Linux says of this process; 0 elsewhere."""
    if not STATUS.exists():
        return 0
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", STATUS.read_text())[1])  # type: ignore[index]


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Raises `Broken` at the end if more memory was in use in between than a folder of this size justifies."""
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    yield
    grown = memory("VmHWM") - before
    if grown > MOST_BYTES + MOST_TIMES * num_bytes:
        raise Broken(f"takes {grown / 2**20:.0f} MiB of memory for a folder of {num_bytes / 2**20:.1f} MiB")
