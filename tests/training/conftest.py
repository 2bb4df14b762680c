"""A run that nothing interrupted."""

import gc
from types import SimpleNamespace

import pytest

from tests.training.small_runs import Recorder, run


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected():
    """accelerate collects garbage before every training, which takes half a second with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A membership run of two rounds that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recorded = Recorder()
    made = run(folder, callbacks=[recorded])
    return SimpleNamespace(folder=folder, trainer=made, rounds=made.rounds, recorded=recorded)
