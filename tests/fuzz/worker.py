"""A process that reads damaged folders, one after the other, within limits of memory and time."""

from __future__ import annotations

import faulthandler
import resource
import shutil
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import readers
from tests.fuzz.folders import CHANGED
from tests.fuzz.mutations import apply
from tests.fuzz.oracle import Broken, Watch, is_refusal, limited_memory, listing, memory, signature


MOST_MEMORY = 2 * 2**30  # bytes, beside what the libraries have taken at the start
MOST_SECONDS = 10  # of the processor, since other programs may run


def serve(connection: Connection, seeds: Path, folder: Path) -> None:
    """Answers every case that comes with what came of it, until there is nothing more. Works in `folder`."""
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    readers.start(seeds)
    watch = Watch()
    for kind in readers.READERS:  # what is imported and made only once is no case's
        for number in range(3):
            run(watch, {"kind": kind, "folder": number, "mutations": []}, seeds, folder)
    resource.setrlimit(resource.RLIMIT_AS, 2 * (memory("VmSize") + MOST_MEMORY,))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGPROF, chain=True)  # says where, and then ends the process
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(run(watch, case, seeds, folder))


def run(watch: Watch, case: dict[str, Any], seeds: Path, folder: Path) -> dict[str, Any]:
    """What comes of a case: `came`, what was `done` to the files, and of a finding its `signature` and `detail`."""
    kind, whole = case["kind"], seeds / case["kind"] / str(case["folder"])
    work = folder / str(case["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, work)
    (folder / "outside").mkdir()
    done = apply(work, case["mutations"], CHANGED[kind])
    before, num_bytes = listing(folder), sum(file.stat().st_size for file in work.rglob("*"))
    sys.path.insert(0, str(work))
    try:
        with watch.watching(work), limited_memory(num_bytes):
            came: Any = attempt(kind, work)
        after = listing(folder)
        changed = sorted(path for path in {**before, **after} if before.get(path) != after.get(path))
        inside = f"{work.name}/" if kind in readers.WRITING else "nothing"
        changed = [path for path in changed if not path.startswith(inside) and path != work.name]
        if changed:
            raise Broken(f"reading has changed {changed[0]}")
    except Broken as error:
        came = error
    finally:
        sys.path.remove(str(work))
    if isinstance(came, str):
        return {"came": came, "done": done}
    if is_refusal(came, work, readers.words(whole)):
        return {"came": "refused", "done": done, "detail": f"{type(came).__name__}: {came}"[:500]}
    where = str(came) if isinstance(came, Broken) else signature(came)
    detail = "".join(traceback.format_exception(came))[-3000:]
    return {"came": "found", "done": done, "signature": where, "detail": detail}


def attempt(kind: str, folder: Path) -> str | BaseException:
    """What the reader returns, or the error that it raises."""
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        return readers.READERS[kind](folder)
    except (Exception, SystemExit) as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
