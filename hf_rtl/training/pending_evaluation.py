"""An evaluation that fails during a joint retraining: its weights are kept, and evaluated first in a continued run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy


@contextlib.contextmanager
def kept_if_it_fails(trainer: Trainer) -> Iterator[None]:
    """
    A context for an evaluation: on an error the checkpoint of this step is saved, marked as not yet evaluated. With
    several processes it is not: one of them may have failed alone, and all are needed to save.
    """
    try:
        yield
    except Exception:
        if trainer.args.world_size == 1 and not _checkpoint(trainer).exists():
            trainer.control.should_evaluate = True
            trainer._save_checkpoint(trainer.model, trial=None)
        raise


def evaluate_if_pending(trainer: Trainer, model: Any) -> None:
    """Evaluates, and saves, if a training is continued from a checkpoint that is marked as not yet evaluated."""
    saved = trainer.state.stateful_callbacks.get("TrainerControl", {"args": {}})["args"]
    if not saved.get("should_evaluate"):
        return
    is_best = trainer._determine_best_metric(trainer._evaluate(None, None), None)
    if is_best if trainer.args.save_strategy == SaveStrategy.BEST else saved["should_save"]:
        # The failed evaluation has drawn what this one has drawn again.
        trainer._load_rng_state(str(_checkpoint(trainer)))
        trainer._save_checkpoint(model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def _checkpoint(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}")
