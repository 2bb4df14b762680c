"""
The identity of a run: all inputs that decide its result, as JSON values. A directory continues only the same run.

Evaluation is not part of the identity, and neither are objects that exist in this process only.
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


# The fields of a model's configuration that training changes, or that name the version that wrote it.
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
    The values that decide the result of a run, and those of them that decide the masks.

    Args:
        model ([`RTLModel`]), args ([`RTLTrainingArguments`]), data ([`RouteData`]): the inputs of the run.
        initial (`Mapping[str, Tensor]`): the initial weights and buffers of the backbone.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _CHANGED_BY_A_RUN}
    routes = hash_tensors({"route_ids": torch.from_numpy(data.partition.route_ids)})
    extraction = {
        **args.select_values(EXTRACTION_FIELDS),
        "initial_weights": hash_tensors(initial),
        "route_ids": routes,
        "seed": data.seed,
        "mixed_precision": args.mixed_precision,  # `accelerate launch` can set it too
        "ticket_task": model.config.ticket_task,
        "prunable": config["prunable"],
        "backbone_config": config["backbone_config"],
    }
    return {**extraction, **args.select_values(RETRAINING_FIELDS), "model": config}, extraction


def with_later_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """
    The identity in a file, with the fields of `current` that did not exist when the file was written.

    Such a field gets the value that earlier runs had: the `"before"` in the metadata of its definition, or else its
    default. So earlier runs can continue.
    """
    completed = _completed(saved, current, RTLTrainingArguments)
    if "model" in completed and "model" in current:
        completed["model"] = _completed(completed["model"], current["model"], RTLConfig)
    return completed


def _completed(saved: Mapping[str, Any], current: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """`saved`, completed with missing fields of the dataclass `kind` and of the backbone's configuration."""
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
    """Completes the backbone's fields, to which its library adds too; their defaults are the earlier behaviour."""
    if saved["model_type"] != current["model_type"]:
        return saved
    defaults = AutoConfig.for_model(saved["model_type"]).to_dict()
    missing = [name for name in current if name not in saved and name in defaults]
    return {**saved, **{name: defaults[name] for name in missing}}
