"""The networks that are measured, with random inputs and random masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel, ViTConfig

from hf_rtl import MaskBank, RTLModel, RTLModelForImageClassification, RTLModelForSequenceClassification


_OF_384 = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
BERT = BertConfig(**_OF_384)
VIT = ViTConfig(**_OF_384, image_size=64, patch_size=8)


@dataclass(frozen=True)
class Case:
    """
    A network and a batch.

    Args:
        name (`str`): as in tables.
        backbone: as for `from_backbone`.
        shape (`tuple[int, ...]`): of the batch: `[images, 3, side, side]`, or `[texts, tokens]`.
        options (`dict`, *optional*): further arguments of `from_backbone`.
    """

    name: str
    backbone: Any
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        return len(self.shape) == 4

    def model(self, num_routes: int) -> RTLModel:
        """A routed model whose masks keep everything."""
        cls = RTLModelForImageClassification if self.has_images else RTLModelForSequenceClassification
        names = [f"route {k}" for k in range(num_routes)]
        return cls.from_backbone(
            self.backbone, route_names=names, ticket_task="labels", num_labels=2, seed=0, **self.options
        )

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.has_images:
            return {"pixel_values": torch.randn(self.shape, generator=generator)}
        return {"input_ids": torch.randint(1000, self.shape, generator=generator)}


def with_random_masks(model: RTLModel, density: float = 0.5) -> RTLModel:
    """The same model, every route of which has random masks of a density."""
    generator, bank = torch.Generator().manual_seed(0), model.mask_bank
    for route in range(bank.num_routes):
        bank[route] = [torch.rand(shape, generator=generator) < density for shape in bank.shapes]
    return model


def fill_with_random_bits(bank: MaskBank) -> None:
    """Gives all routes random masks of density a half, without unpacking any."""
    generator = torch.Generator().manual_seed(0)
    for shape, rows in zip(bank.shapes, bank.packed, strict=True):
        rows.random_(0, 256, generator=generator)
        rows[:, -1] &= 0xFF >> (-shape.numel() % 8)  # the padding bits are zero


def without_half_of_units(model: RTLModel, inputs: dict[str, Tensor]) -> RTLModel:
    """The same model, every route of which lacks half of the units of each layer of units."""
    generator, bank = torch.Generator().manual_seed(0), model.mask_bank
    names = set(bank.weight_names)
    layers = [layer for layer in model.unit_layers(inputs) if {name for name, _ in layer.readers} <= names]
    for route in range(bank.num_routes):
        masks = dict(zip(bank.weight_names, bank[route], strict=True))
        for layer in layers:
            removed = torch.randperm(layer.num_units, generator=generator)[: layer.num_units // 2]
            for (name, dim), units in layer.places.items():
                if name in masks:
                    masks[name].index_fill_(dim, units[removed].flatten(), False)
        bank[route] = list(masks.values())
    return model


def extract_all(model: RTLModel) -> list[PreTrainedModel]:
    """The tickets of all routes, as plain models in evaluation mode."""
    return [model.extract_ticket(route).eval() for route in range(model.num_routes)]
