"""
What makes a run the one that a directory holds: everything that was given and decides its result, in JSON values.

Evaluation is not part of it, and neither are objects that live in this process only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..data.route_data import RouteData
from ..modeling.configuration_rtl import RTLConfig
from ..modeling.hashing import hash_tensors
from ..modeling.modeling_rtl import RTLModel
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments


# Fields of a model's configuration that training changes, or that say what wrote it.
_CHANGED_BY_A_RUN = (
    "mask_fingerprint",
    "base",
    "thresholds",
    "router",
    "router_features",
    "router_threshold",
    "router_fallback",
    "transformers_version",
    "hf_rtl_version",
    "format_version",
    "architectures",
)


def run_identity(
    model: RTLModel, args: RTLTrainingArguments, data: RouteData, initial: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    What decides the result of a run, and the part of it that decides the masks.

    Args:
        model ([`RTLModel`]), args ([`RTLTrainingArguments`]), data ([`RouteData`]): as given.
        initial (`Mapping[str, Tensor]`): the weights and buffers that the backbone was given with.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _CHANGED_BY_A_RUN}
    routes = hash_tensors({"route_ids": torch.from_numpy(data.partition.route_ids)})
    extraction = {
        **args.values_of(EXTRACTION_FIELDS),
        "initial_weights": hash_tensors(initial),
        "route_ids": routes,
        "seed": data.seed,
        "mixed_precision": args.mixed_precision,  # `accelerate launch` can set it too
        "ticket_task": model.config.ticket_task,
        "prunable": config["prunable"],
        "backbone_config": config["backbone_config"],
    }
    return {**extraction, **args.values_of(RETRAINING_FIELDS), "model": config}, extraction


def with_later_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """
    The identity in a file, with the fields of `current` that did not exist when the file was written.

    A field gets the value that runs had before it existed: the `"before"` in the metadata of its definition, or else
    its default. So a new field refuses no earlier run.
    """
    completed = _completed(saved, current, RTLTrainingArguments)
    if "model" in completed and "model" in current:
        completed["model"] = _completed(completed["model"], current["model"], RTLConfig)
    return completed


def _completed(saved: Mapping[str, Any], current: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """`saved` with the fields of the dataclass `kind` that it lacks, and those of the backbone in it."""
    known = {field.name: field for field in fields(kind)}
    missing = [name for name in current if name not in saved and name in known]
    completed = {**saved, **{name: _value_before(known[name]) for name in missing}}
    if "backbone_config" in saved and "backbone_config" in current:
        completed["backbone_config"] = _completed_backbone(saved["backbone_config"], current["backbone_config"])
    return completed


def _value_before(field: Field) -> Any:
    if "before" in field.metadata:
        return field.metadata["before"]
    return field.default if field.default_factory is MISSING else field.default_factory()


def _completed_backbone(saved: dict[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The library that a backbone is from adds fields too; their defaults are what the backbone did without them."""
    if saved["model_type"] != current["model_type"]:
        return saved
    defaults = AutoConfig.for_model(saved["model_type"]).to_dict()
    missing = [name for name in current if name not in saved and name in defaults]
    return {**saved, **{name: defaults[name] for name in missing}}
