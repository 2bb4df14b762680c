"""A run without interruptions, which tests share."""

from types import SimpleNamespace

import pytest

from tests.training.small_runs import Recorder, run


@pytest.fixture(scope="module", autouse=True)
def cards_have_no_picture():
    """Cards are written as without matplotlib: drawing would take longer than all else that a small run does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_rtl.model_card.card.find_spec", lambda name: None)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A membership run of two rounds without interruptions. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recorded = Recorder()
    made = run(folder, callbacks=[recorded])
    return SimpleNamespace(folder=folder, trainer=made, rounds=made.rounds, recorded=recorded)
