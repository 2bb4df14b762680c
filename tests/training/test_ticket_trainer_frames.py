"""Few frames of hf_rtl lie between the step loop of extraction and transformers, which helps to debug a step."""

import sys
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

import hf_rtl
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state
from tests.training.small_runs import make_trainer


PACKAGE = Path(hf_rtl.__file__).parent


def frames_below_the_step_loop():
    """The functions of hf_rtl on the stack below the loop over steps."""
    frame, found = sys._getframe(2), []
    while frame is not None and frame.f_code is not TicketTrainer.train.__code__:
        if PACKAGE in Path(frame.f_code.co_filename).parents:
            found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found if frame is not None else None


def test_at_most_three_frames_lie_between_the_steps_of_extraction_and_transformers(tmp_path, monkeypatch):
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*positional, **keywords):
            if (frames := frames_below_the_step_loop()) is not None:
                seen.setdefault(name, frames)
            return original(*positional, **keywords)

        monkeypatch.setattr(owner, name, watched)

    watch(Trainer, "compute_loss")
    watch(Trainer, "_prepare_inputs")
    watch(RemoveColumnsCollator, "__call__")
    made = make_trainer(tmp_path / "run")
    ticket = made.ticket_trainer(dict(named_state(made.model.backbone)))
    ticket.train(None, made.extraction_batches(0, 0), seed=(0,))
    assert seen.keys() == {"compute_loss", "_prepare_inputs", "__call__"}
    assert all(1 <= len(frames) <= 3 for frames in seen.values()), seen
