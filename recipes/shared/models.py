"""The models of a run: made from a backbone, or loaded as a trainer saved them after a round."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLTrainer

from .image_data import ImageTensors


def membership_model(
    backbone: str, images: ImageTensors, *, seed: int, **options: Any
) -> RTLModelForImageClassification:
    """A model with a ticket per class of `images`; the ticket tells the images of its class from all others."""
    return RTLModelForImageClassification.from_backbone(
        backbone,
        route_names=images.label_names,
        ticket_task="membership",
        seed=seed,
        in_chans=images.num_channels,
        **options,
    )


def model_of_round(trainer: RTLTrainer, report: dict[str, Any]) -> RTLModel:
    """The model that a trainer saved after the round of a report."""
    return type(trainer.model).from_pretrained(f"{trainer.args.output_dir}/{report['folder']}")


def tickets_of_round(trainer: RTLTrainer, report: dict[str, Any]) -> list[list[Tensor]]:
    """The tickets of the model of a round: for every route its masks, one per prunable weight."""
    model = model_of_round(trainer, report)
    return [model.mask_bank[route] for route in range(model.num_routes)]
