"""Rules of partitions, pushed with a model and loaded by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_rtl import ByCentres, ByColumn, Partition, RTLModel, RTLTrainer, load_rule
from tests.hub.clients.models import ROUTES, log_messages
from tests.hub.clients.runs import SHORT, make_trainer


FEATURES = np.random.default_rng(0).normal(size=(24, 5))
RULES = {
    "centres": ByCentres(torch.from_numpy(FEATURES[:3]), ROUTES),
    "column": ByColumn("label", ROUTES),
    "none": None,
}


def trained(kind: str, **arguments: Any) -> RTLTrainer:
    """A trainer after a training whose partition has a rule of `kind`."""
    trainer = make_trainer(partition=Partition(np.arange(24) % 3, ROUTES, rule=RULES[kind]), **SHORT, **arguments)
    trainer.train()
    return trainer


def train_then_push_run(kind: str, name: str) -> None:
    trained(kind, hub_model_id=name).push_to_hub()


def train_then_push_model(kind: str, name: str) -> None:
    trained(kind).model.push_to_hub(name)


def assign(name: str, size: int = 24, **options: Any) -> list[int]:
    """The routes of `FEATURES`, `size` samples at a time, by the rule in a repository."""
    rule = load_rule(name, **options)
    parts = [rule.assign(FEATURES[start : start + size]).route_ids for start in range(0, 24, size)]
    return np.concatenate(parts).tolist()


def describe_rule(name: str, **options: Any) -> str:
    return load_rule(name, **options).describe()


def change_and_push(source: str, name: str, *, drop: str | None = None) -> list[str]:
    """The log messages on rules while a copy of a model was pushed."""
    said = log_messages()
    model = RTLModel.from_pretrained(source)
    if drop is not None:
        model.drop_route(drop)
    model.push_to_hub(name)
    return [line for line in said if "rule" in line]
