"""
The identity of a run: all inputs that decide its weights, as JSON values. A directory continues only the same run.

It is taken from what was given, since training and calls change live objects. Evaluation is not part of it, and
neither are objects that exist in this process only.
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
from .data_identity import MakeCollate, identify_data
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments, default_scope


# The fields of a model's configuration that decide no weight: a run changes them, they name the version that wrote it
# or where it was, or they follow from others.
_DECIDING_NOTHING = (
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
    "problem_type",
    "mask_cache_bytes",
    "compute",
    "use_cache",
    "_name_or_path",
)
# Such fields of the backbone's configuration: those that saving and loading write, that ask for more outputs, names.
_IDLE_BACKBONE_FIELDS = {
    *_DECIDING_NOTHING,
    "dtype",
    "id2label",
    "label2id",
    "label_names",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
} - {"problem_type"}
# The arguments that decide weights only where the best checkpoint is kept, or the schedule follows a metric.
_METRIC_ARGUMENTS = ("metric_for_best_model", "greater_is_better")
_SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def run_identity(
    config: Mapping[str, Any],
    args: RTLTrainingArguments,
    data: RouteData,
    initial: Mapping[str, Tensor],
    *,
    make_collate: MakeCollate,
    labels: Any = None,
    calibration_data: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The values that decide the weights of a run, and those of them that decide the masks.

    Args:
        config (`Mapping[str, Any]`): the model's configuration as it was given.
        args ([`RTLTrainingArguments`]), data ([`RouteData`]): the arguments and the training data of the run.
        initial (`Mapping[str, Tensor]`): the initial weights and buffers of the backbone.
        make_collate (`Callable`): the same as for `identify_data`.
        labels (*optional*): the labels of a batch.
        calibration_data (`Mapping[str, Any]`, *optional*): the identity of data that thresholds or a router of the
            model are fitted on, if they are no part of the training data.
    """
    backbone = {**config["backbone_config"], "problem_type": _problem_type(config, labels)}
    config = {**config, "backbone_config": backbone}
    known = identify_data(
        data.dataset, data.partition, args.device, membership=data.membership, make_collate=make_collate
    )
    extraction = {
        **args.select_values(EXTRACTION_FIELDS),
        "initial_weights": hash_tensors(initial),
        "route_ids": known.pop("routes"),
        "data": known,
        "seed": data.seed,
        "mixed_precision": args.mixed_precision,  # `accelerate launch` can set it too
        "ticket_task": config["ticket_task"],
        "prunable": config["prunable"],
        "backbone_config": backbone,
    }
    configuration = {**extraction, **args.select_values(RETRAINING_FIELDS), "model": config}
    if calibration_data is not None:
        configuration["calibration_data"] = calibration_data
    return _deciding(configuration), _deciding(extraction)


def _problem_type(config: Mapping[str, Any], labels: Any) -> str | None:
    """The problem type; if none was given, the one that transformers writes at the first call with labels."""
    backbone = config["backbone_config"]
    given = backbone.get("problem_type")
    if given is not None or not isinstance(labels, Tensor):
        return given
    if len(backbone.get("id2label") or backbone["label_names"]) == 1:
        return "regression"
    return "single_label_classification" if labels.dtype in (torch.long, torch.int) else "multi_label_classification"


def _deciding(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what decides no weight."""
    follows_metric = configuration.get("lr_scheduler_type") in _SCHEDULES_BY_METRIC
    idle = () if follows_metric or configuration.get("load_best_model_at_end") else _METRIC_ARGUMENTS
    found = {name: value for name, value in configuration.items() if name not in idle}
    backbone = found.get("backbone_config", {})
    if "backbone_config" in found:
        kept = backbone.keys() - _IDLE_BACKBONE_FIELDS
        found["backbone_config"] = {name: value for name, value in backbone.items() if name in kept}
    if "model" in found:
        # Fields of both are not compared twice.
        left_out = {*_DECIDING_NOTHING, *_IDLE_BACKBONE_FIELDS, *found, *backbone}
        found["model"] = {name: value for name, value in found["model"].items() if name not in left_out}
    return found


def with_later_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """
    The identity in a file, as this version would have written it: without what decides no weight, and with the fields
    of `current` that did not exist when the file was written.

    Such a field gets the value that earlier runs had: the `"before"` in the metadata of its definition, or else its
    default. So earlier runs can continue. Where a hash of data is unknown, there or now, it is not compared.
    """
    completed = _completed(_deciding(saved), current, RTLTrainingArguments)
    if "model" in completed and "model" in current:
        completed["model"] = _completed(completed["model"], current["model"], RTLConfig)
    for name in ("data", "calibration_data"):
        # Earlier versions wrote neither.
        there, now = completed.get(name) if "data" in saved else current.get(name), current.get(name)
        if there is not None and now is not None:
            completed[name] = _completed_data(there, now)
    return completed


def _completed(saved: Mapping[str, Any], current: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """`saved`, completed with missing fields of the dataclass `kind` and of the backbone's configuration."""
    known = {field.name: field for field in fields(kind)}
    missing = [name for name in current if name not in saved and name in known]
    completed = {**saved, **{name: _value_before(known[name]) for name in missing}}
    if "backbone_config" in saved and "backbone_config" in current:
        completed["backbone_config"] = _completed_backbone(saved["backbone_config"], current["backbone_config"])
    return completed


def _completed_data(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """`saved`, with the hashes of `current` where one of the two is unknown, and of data that decide nothing."""
    if "stored" not in saved and saved["features"] == current["stored"]:  # an earlier version hashed all columns
        saved = {**saved, "features": current["features"]}
    saved = {**saved, "stored": current["stored"]}
    unknown = [name for name in current if saved.get(name) is None or current[name] is None]
    return {**saved, **{name: current[name] for name in unknown}}


def _value_before(field: Field) -> Any:
    if field.name == "prune_scope":
        return default_scope("weight")
    if "before" in field.metadata:
        return field.metadata["before"]
    return field.default if field.default_factory is MISSING else field.default_factory()


def _completed_backbone(saved: dict[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the backbone's fields, to which its library adds too; their defaults are the earlier behaviour."""
    if saved["model_type"] != current["model_type"]:
        return saved
    defaults = AutoConfig.for_model(saved["model_type"]).to_dict()
    missing = [name for name in current if name not in saved and name in defaults]
    if saved.get("problem_type", "") is None:
        missing.append("problem_type")  # earlier versions wrote what was given, before the first call
        defaults = {**defaults, "problem_type": current.get("problem_type")}
    return {**saved, **{name: defaults[name] for name in missing}}
