"""An evaluation that fails during a joint retraining: its weights are kept, and evaluated first in a continued run."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def kept_if_it_fails(trainer: Trainer) -> Iterator[None]:
    """
    A context for an evaluation: on an error the checkpoint of this step is saved, marked as not yet evaluated. With
    several processes it is not: one of them may have failed alone, and all are needed to save.
    """
    try:
        yield
    except Exception:
        checkpoint = _checkpoint(trainer)
        if trainer.args.world_size == 1 and trainer.state.global_step and not checkpoint.exists():
            trainer.control.should_evaluate = True
            trainer._save_checkpoint(trainer.model, trial=None)
            logger.error(
                f"an evaluation failed; the weights at that step are kept in {str(checkpoint)!r}. The same command "
                "evaluates them first, and removes that checkpoint at the end of the joint retraining, unless "
                "`save_strategy` saves at that step too."
            )
        raise


def evaluate_if_pending(trainer: Trainer, model: Any) -> bool:
    """
    Evaluates, and saves, if a training is continued from a checkpoint that is marked as not yet evaluated. Returns
    whether it is.
    """
    saved = _control(trainer.state.stateful_callbacks)
    if not saved.get("should_evaluate"):
        return False
    is_best = trainer._determine_best_metric(trainer._evaluate(None, None), None)
    if is_best if trainer.args.save_strategy == SaveStrategy.BEST else saved["should_save"]:
        # The failed evaluation has drawn what this one has drawn again.
        trainer._load_rng_state(str(_checkpoint(trainer)))
        trainer._save_checkpoint(model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return True


def remove_pending(folder: Path) -> None:
    """Removes the checkpoints in a folder that are marked as not yet evaluated."""
    for file in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        if _control(json.loads(file.read_text())["stateful_callbacks"]).get("should_evaluate"):
            shutil.rmtree(file.parent)


def _control(callbacks: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was to be done at a step, as the state of callbacks in a checkpoint has it."""
    return callbacks.get("TrainerControl", {"args": {}})["args"]


def _checkpoint(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}")
