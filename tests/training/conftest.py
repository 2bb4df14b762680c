"""A run without interruptions, which tests share."""

import gc
from types import SimpleNamespace

import pytest

from tests.training.small_runs import Recorder, run


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected():
    """Without this, accelerate's garbage collection before every training visits all imports for half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A membership run of two rounds without interruptions. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recorded = Recorder()
    made = run(folder, callbacks=[recorded])
    return SimpleNamespace(folder=folder, trainer=made, rounds=made.rounds, recorded=recorded)
