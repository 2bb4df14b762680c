"""A run without interruptions, which tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.training.small_runs import Recorder, run


@contextmanager
def no_cards() -> Iterator[None]:
    """`train()` writes no card, which would take longer than all else in a small run. `tests/model_card` has cards."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_rtl.training.trainer.write_card", lambda *arguments, **given: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_cards_are_written():
    with no_cards():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A membership run of two rounds without interruptions. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recorded = Recorder()
    with no_cards():
        made = run(folder, callbacks=[recorded])
    return SimpleNamespace(folder=folder, trainer=made, rounds=made.rounds, recorded=recorded)
