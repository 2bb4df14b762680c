"""Tickets in repositories of their own, and compact models."""

from __future__ import annotations

from typing import Any

import torch

from hf_rtl import RTLModel
from tests.hub.clients.models import describe, make_model


def push_tickets(base: str, name: str, *, routes: list[str] | None = None, added: str | None = None, **options: Any):
    """Pulls `base`, adds a ticket for a route `added` and pushes tickets. Returns the author's model."""
    model = RTLModel.from_pretrained(base)
    if added is not None:
        generator = torch.Generator().manual_seed(7)
        masks = [torch.rand(shape, generator=generator) < 0.3 for shape in model.mask_bank.shapes]
        for weight, mask, union in zip(model.masker.weights, masks, model.mask_bank.union(), strict=True):
            weight.data[mask & ~union] = 0.1
        statistics = [rows[0] for rows in model.norm_statistics.rows]
        model.append_ticket(added, masks, statistics=statistics, brings_weights=True)
    model.push_tickets_to_hub(name, routes, **options)
    return describe(model)


def pull_with_tickets(
    base: str, name: str, *arguments: Any, drop: str | None = None, **options: Any
) -> dict[str, Any]:
    """Adds tickets to a copy of `base`. Returns the user's model."""
    model = RTLModel.from_pretrained(base)
    if drop is not None:
        model.drop_route(drop)
    model.load_tickets(name, *arguments, **options)
    return describe(model)


def push_model_and_tickets(base: str, name: str) -> None:
    model = make_model("vit")
    model.push_to_hub(base)
    model.push_tickets_to_hub(name)


def push_compact(name: str, kind: str) -> dict[str, Any]:
    """Pushes a model in the compact form. Returns what is pulled."""
    model = make_model(kind)
    commit = model.push_to_hub(name, compact=True)
    assert model.config.base["revision"] == commit.oid
    return {key: value for key, value in describe(model).items() if key != "tensors"}
