"""Runs that break off in the middle."""

from collections import Counter

import pytest
from transformers import TrainerCallback

from hf_rtl import RTLTrainer
from hf_rtl.training import extraction, rounds
from hf_rtl.training.prune_rule import PruneRule
from tests.training.small_runs import make_trainer


class StopError(Exception):
    pass


class StopAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step
        self.seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen += 1
        if self.seen == self.step:
            raise StopError


class StopAtEvaluation(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_evaluate(self, args, state, control, **kwargs):
        self.number -= 1
        if self.number == 0:
            raise StopError


def stop_in(monkeypatch, name, number):
    """Raises at the `number`-th call of a method of `RTLTrainer` or `PruneRule`, or of a function of a round."""
    owner = next(owner for owner in (RTLTrainer, PruneRule, extraction, rounds) if hasattr(owner, name))
    original, calls = getattr(owner, name), Counter()

    def stopping(*positional, **keywords):
        calls["made"] += 1
        if calls["made"] == number:
            raise StopError
        return original(*positional, **keywords)

    monkeypatch.setattr(owner, name, stopping)


def interrupt(monkeypatch, folder, place, **values):
    """The trainer of a run that breaks off at `place`: (a kind of event, the number of the event)."""
    kind, number = place
    callbacks = {"step": StopAtStep, "evaluation": StopAtEvaluation}
    with monkeypatch.context() as patched:
        if kind not in callbacks:
            stop_in(patched, kind, number)
        made = make_trainer(folder, callbacks=[callbacks[kind](number)] if kind in callbacks else [], **values)
        with pytest.raises(StopError):
            made.train()
    return made
