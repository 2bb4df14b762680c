"""What a run says of itself: a report of every round, and the record of the whole run for the model's card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..model_card.run_record import model_identity
from ..modeling.modeling_rtl import RTLModel
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments


# What decides the result; nothing that could be private is among them: no path, name or token.
_ARGUMENTS = [
    *EXTRACTION_FIELDS,
    *(name for name in RETRAINING_FIELDS if name not in EXTRACTION_FIELDS),
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "full_determinism",
    "gradient_checkpointing",
    "allow_disconnected",
]
# Of a round's report: what is the same whether or not the run was interrupted.
_OF_A_ROUND = (
    "round",
    "sparsity",
    "kept",
    "union",
    "core",
    "mean_similarity",
    "emptied_layers",
    "steps",
    "surroundings",
)


def describe_run(
    model: RTLModel,
    args: RTLTrainingArguments,
    reports: Sequence[Mapping[str, Any]],
    *,
    num_training_samples: Mapping[str, int],
    num_evaluation_samples: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """
    JSON values of all that a card says of a run: nothing of the machine or the user but the kind of device.

    Args:
        model ([`RTLModel`]): as the run left it, and as it is saved.
        args ([`RTLTrainingArguments`]): of the run.
        reports: of all rounds.
        num_training_samples (`Mapping[str, int]`): route -> its number.
        num_evaluation_samples (`Mapping[str, Mapping[str, int]]`): name of an evaluation set, `""` if there is but
            one -> route -> its number; empty if nothing was evaluated.
    """
    values = args.to_dict()
    defaults = {field.name: _default(field) for field in fields(RTLTrainingArguments)}
    # Off is off, whether by `False` or by `None`.
    changed = [name for name in _ARGUMENTS if (values[name] or None) != (defaults[name] or None)]
    prefixes = {name: f"eval_{name}_" if name else "eval_" for name in num_evaluation_samples}
    run = {
        "model": model_identity(model),
        "backbone": _repo_of(model.backbone),
        "arguments": {name: values[name] for name in changed},
        "defaults": {name: defaults[name] for name in changed},
        "seed": args.seed,
        "thresholds": model.config.thresholds,
        "num_training_samples": dict(num_training_samples),
        "rounds": [{name: report.get(name) for name in _OF_A_ROUND} for report in reports],
        "evaluations": [
            {
                "name": name,
                "num_samples": dict(num_samples),
                "rounds": [_metrics(report["metrics"], prefixes[name], list(prefixes.values())) for report in reports],
            }
            for name, num_samples in num_evaluation_samples.items()
        ],
    }
    return _finite(run)


def _repo_of(backbone: Any) -> str | None:
    """The repository that a backbone was loaded from, if it is in the cache. A folder's name is nobody's business."""
    name = backbone.name_or_path
    if not name or Path(name).exists():
        return None
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return name if isinstance(cached, str) else None


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _metrics(metrics: Mapping[str, float], prefix: str, prefixes: Sequence[str]) -> dict[str, float]:
    """The metrics of one evaluation set, without its prefix, which may be the beginning of another's."""
    longer = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    of_the_clock = ("_runtime", "_per_second")
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not (longer and name.startswith(longer)) and not name.endswith(of_the_clock)
    }


def _finite(value: Any) -> Any:
    """`value` with `None` for what JSON and YAML have no number for."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
