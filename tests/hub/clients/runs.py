"""Small trainings, whose trainers push. Models are returned as `describe` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError

from hf_rtl import Partition, RTLTrainer, RTLTrainingArguments
from tests.hub.clients.models import describe, make_model, timm_processor


# Arguments of a training of one round without checkpoints.
SHORT = {"target_sparsity": [0.2], "save_strategy": "no"}


def make_trainer(*, partition: Partition | None = None, **arguments: Any) -> RTLTrainer:
    """Two rounds of a small network on noise, in the folder `run`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(24, 3, 32, 32, generator=generator)
    samples = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]
    settings = {
        "output_dir": str(Path("run").absolute()),
        "target_sparsity": [0.2, 0.4],
        "prune_amount": 0.3,
        "extraction_steps": 1,
        "max_steps": 1,
        "route_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RTLTrainer(
        make_model("vit"),
        RTLTrainingArguments(**{**settings, **arguments}),
        train_dataset=samples,
        partition=partition,
        processing_class=timm_processor(),
    )


def train(**arguments: Any) -> dict[str, Any]:
    """The final model of a training."""
    trainer = make_trainer(**arguments)
    trainer.train()
    return describe(trainer.model.eval())


def train_then_push(options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The final model of a training, which is pushed with `options`."""
    trainer = make_trainer(**arguments)
    trainer.train()
    trained = describe(trainer.model.eval())
    trainer.push_to_hub(**options)
    return trained


def train_then_push_twice(**arguments: Any) -> tuple[str, dict[str, Any]]:
    """The error of the first push, and the final model; then a second push succeeds."""
    trainer = make_trainer(**arguments)
    trainer.train()
    try:
        trainer.push_to_hub()
    except (HfHubHTTPError, RuntimeError) as error:
        failure = f"{error} {error.__cause__}"
    trainer.push_to_hub()
    return failure, describe(trainer.model.eval())


def retrain_then_push(**arguments: Any) -> dict[str, Any]:
    """The final model of a training, before its trainer was used for a control."""
    trainer = make_trainer(**arguments)
    trainer.train()
    trained = describe(trainer.model.eval())
    masks = [trainer.model.mask_bank[route] for route in (1, 2, 0)]
    trainer.retrain(masks, like=trainer.rounds[-1]["folder"], name="shuffled")
    trainer.push_to_hub()
    return trained


def push_untrained(**arguments: Any) -> None:
    make_trainer(**arguments).push_to_hub()
