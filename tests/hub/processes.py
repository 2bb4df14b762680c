"""Runs functions in processes of their own, each in an empty folder with an empty cache of the Hub's client."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.child_processes import ROOT, environment


# The folder of the client's cache. The client reads it at its import, in the process that all others are forked from;
# as it is relative, it is another folder for each of them.
CACHE = "cache"


class ClientError(Exception):
    """A function failed in its process; the message is the traceback."""


class Clients:
    """
    Forks processes from one that has imported everything, which takes seconds, and that knows only the Hub at `url`.

    Args:
        url (`str`): address of the Hub.
        log (`Path`): file for the output of the processes.
    """

    def __init__(self, url: str, log: Path) -> None:
        with log.open("w") as output:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.hub.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=client_environment(url, cache=CACHE),
                cwd=log.parent,
            )

    def run(self, function: Callable, arguments: tuple, keywords: dict, folder: Path, token: str | None) -> Any:
        """The result of `function`, of a module, in a new process with `folder` as its working directory."""
        folder.mkdir(parents=True, exist_ok=True)
        pickle.dump((function, arguments, keywords, str(folder), token), self._server.stdin)
        self._server.stdin.flush()
        succeeded, result = pickle.load(self._server.stdout)
        if not succeeded:
            raise ClientError(result)
        return result

    def stop(self) -> None:
        self._server.kill()
        self._server.wait()


def client_environment(url: str, *, cache: str | Path, **more: str) -> dict[str, str]:
    """Variables for a process whose client knows only the Hub at `url`."""
    kept = {name: value for name, value in environment().items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        # No certificates: reading them takes a fifth of a process, and this Hub speaks HTTP.
        "SSL_CERT_DIR": str(ROOT),
        "SSL_CERT_FILE": "",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def _serve() -> None:
    import tests.hub.preloaded  # noqa: F401

    with os.fdopen(os.dup(1), "wb") as answers:
        # Standard output becomes standard error, so that prints do not mix with the answers.
        os.dup2(2, 1)
        while True:
            try:
                request = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            process = os.fork()
            if process == 0:
                try:
                    answers.write(pickle.dumps(_answer(*request)))
                    answers.flush()
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(process, 0)
            if status:
                pickle.dump((False, f"the process ended with status {status}"), answers)
                answers.flush()


def _answer(function: Callable, arguments: tuple, keywords: dict, folder: str, token: str | None) -> tuple[bool, Any]:
    os.chdir(folder)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        return True, function(*arguments, **keywords)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
