"""A Hub in this process, and fresh processes that push to it and pull from it with the unchanged client."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.child_processes import ROOT
from tests.hub.environments import Environment, build_wheel
from tests.hub.processes import Clients
from tests.hub.server import LocalHub


@pytest.fixture(scope="session")
def hub() -> Iterator[LocalHub]:
    """Alice and Ann are of the organisation `org`, Bob is not."""
    with LocalHub({"alice": ["org"], "ann": ["org"], "bob": []}) as hub:
        yield hub


@pytest.fixture(scope="session")
def _clients(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    clients = Clients(hub.url, tmp_path_factory.mktemp("clients") / "output.txt")
    yield clients
    clients.stop()


@pytest.fixture
def run(_clients: Clients, tmp_path: Path) -> Callable:
    """`run(function, …, user="alice")` returns the function's result in a new process with an empty cache."""
    numbers = itertools.count(1)

    def run(function, *arguments, user="alice", **keywords):
        token = None if user is None else f"hf_{user}"
        return _clients.run(function, arguments, keywords, tmp_path / f"process-{next(numbers)}", token)

    return run


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment without hf_rtl."""
    return Environment(tmp_path_factory.mktemp("environments") / "bare")


@pytest.fixture(scope="session")
def published_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with hf_rtl as it would be published."""
    folder = tmp_path_factory.mktemp("published")
    environment = Environment(folder / "environment")
    environment.install(build_wheel(ROOT, folder / "build"))
    return environment
