"""The report of a round, and the record of a whole run for the model's card."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.trainer_utils import TrainOutput

from ..data.partition import Partition
from ..model_card.run_record import model_identity
from ..modeling.configuration_rtl import VERSION
from ..modeling.files import json_values
from ..modeling.mask_bank import MaskBank
from ..modeling.modeling_rtl import RTLModel
from ..pruning import emptied_layers
from .plan import Round
from .randomness import numerics_environment
from .ranking import count_units
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments, default_scope


# The arguments that decide the result. None of them is private: they hold no path, name or token.
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
# The ends of names of metrics that measure time.
_TIMES = ("_runtime", "_per_second", "_model_preparation_time")
# The fields of a round's report that an interruption does not change.
_ROUND_FIELDS = (
    "round",
    "sparsity",
    "kept",
    "units",
    "union",
    "core",
    "mean_similarity",
    "emptied_layers",
    "steps",
    "surroundings",
)


def emptied_by_route(model: RTLModel) -> dict[str, list[str]]:
    """Route -> names of the prunable weights of which its ticket keeps no element; only routes with such weights."""
    bank = model.mask_bank
    emptied = {name: emptied_layers(bank[name]) for name in bank.route_names}
    return {name: [bank.weight_names[layer] for layer in layers] for name, layers in emptied.items() if layers}


def report_round(model: RTLModel, round_: Round, *, output: TrainOutput, seconds: float) -> dict[str, Any]:
    """
    The report of a round before its evaluation, as JSON values, in the order of `round.json`. Where units are removed,
    `sparsity` is that of the prunable weights in the masks, and `units` says how many units were asked for and kept.

    Args:
        model ([`RTLModel`]): the model at the end of the round.
        output (`TrainOutput`): output of its joint retraining.
        seconds (`float`): seconds from the start of joint retraining until the model was saved.
    """
    bank = model.mask_bank
    report = {
        "round": round_.index + 1,
        "sparsity": round_.sparsity,
        "folder": round_.name,
        **_masks(model),
        "footprint": model.footprint(),
        "mask_fingerprint": bank.fingerprint(),
        "thresholds": model.config.thresholds,
        "metrics": None,
        "train_loss": output.training_loss,
        "steps": output.global_step,
        "seconds": seconds,
    }
    if round_.layers:
        report |= {
            "sparsity": 1 - float(bank.count().double().mean()) / bank.num_weights,
            "units": _units(bank, round_),
        }
    return report


def _masks(model: RTLModel) -> dict[str, Any]:
    """What the tickets keep, and what they share."""
    bank = model.mask_bank
    similarity = bank.similarity()
    others = similarity.masked_select(~torch.eye(bank.num_routes, dtype=torch.bool, device=similarity.device))
    return {
        "kept": dict(zip(bank.route_names, bank.count().tolist(), strict=True)),
        "union": bank.union_count(),
        "core": bank.core_count(),
        "mean_similarity": float(others.mean()) if len(others) else None,
        "emptied_layers": emptied_by_route(model),
    }


def _units(bank: MaskBank, round_: Round) -> dict[str, Any]:
    """The units at the end of a round: how many each ticket was asked to keep, and how many it keeps."""
    number = sum(layer.num_units for layer in round_.layers)
    return {
        "kind": round_.layers[0].kind,
        "number": number,
        "asked": round_.kept[-1] if round_.kept else number,
        "kept": dict(zip(bank.route_names, count_units(bank, round_.layers), strict=True)),
    }


def describe_run(
    model: RTLModel,
    args: RTLTrainingArguments,
    reports: Sequence[Mapping[str, Any]],
    *,
    training: Partition,
    evaluations: Mapping[str, Partition],
    chance: Mapping[str, Mapping[str, float] | None] | None = None,
) -> dict[str, Any]:
    """
    The record of a run for its card, as JSON values. About machine and user it names only the environment of a round.

    Args:
        model ([`RTLModel`]): the model at the end of the run, as it is saved.
        args ([`RTLTrainingArguments`]): arguments of the run.
        reports (`Sequence[Mapping[str, Any]]`): reports of all rounds.
        training ([`Partition`]): partition of the training data.
        evaluations (`Mapping[str, Partition]`): name of an evaluation set, `""` for a single one -> its partition;
            empty if the run evaluated nothing.
        chance (`Mapping[str, Mapping[str, float] | None]`, *optional*): name of an evaluation set -> its
            `chance_levels`.
    """
    values = args.to_dict()
    defaults = {field.name: _default(field) for field in fields(RTLTrainingArguments)}
    defaults["prune_scope"] = default_scope(args.prune_granularity)
    changed = [name for name in _ARGUMENTS if _or_none(values[name]) != _or_none(defaults[name])]
    prefixes = {name: f"eval_{name}_" if name else "eval_" for name in evaluations}
    run = {
        "model": model_identity(model),
        "backbone": _backbone_repo(model.backbone),
        "arguments": {name: values[name] for name in changed},
        "defaults": {name: defaults[name] for name in changed},
        "seed": args.seed,
        "thresholds": model.config.thresholds,
        "num_training_samples": _num_samples(model, training),
        "rounds": [
            {name: report.get(name) for name in _ROUND_FIELDS if name != "units" or name in report}
            for report in reports
        ],
        "evaluations": [
            {
                "name": name,
                "num_samples": _num_samples(model, partition),
                "chance": (chance or {}).get(name),
                "data": (reports[-1].get("evaluation") or {}).get("data", {}).get(name) if reports else None,
                "rounds": [_metrics(report["metrics"], prefixes[name], list(prefixes.values())) for report in reports],
            }
            for name, partition in evaluations.items()
        ],
    }
    return json_values(run)


def describe_environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions, device and number of processes."""
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
    return {
        "hf_rtl": VERSION,
        **{name: module.__version__ for name, module in modules.items()},
        "python": platform.python_version(),
        **numerics_environment(device),
        "num_processes": num_processes,
    }


def describe_search(
    model: RTLModel, training: Partition, one_pass: Mapping[str, Any], *, seed: int, num_processes: int
) -> dict[str, Any]:
    """
    The record of a search without training for the model's card, as JSON values, like that of `describe_run`.

    Args:
        model ([`RTLModel`]): with the tickets that were found.
        training ([`Partition`]): partition of the data.
        one_pass (`Mapping[str, Any]`): `granularity`, `criterion`, `sparsity`, `num_samples` of a route, `refit`.
        seed (`int`), num_processes (`int`): of the search.
    """
    bank = model.mask_bank
    sparsity = 1 - float(bank.count().double().mean()) / bank.num_weights
    environment = describe_environment(model.device, num_processes)
    report = {"round": 1, "sparsity": sparsity, **_masks(model), "steps": 0, "surroundings": environment}
    run = {
        "model": model_identity(model),
        "backbone": _backbone_repo(model.backbone),
        "arguments": {},
        "defaults": {},
        "seed": seed,
        "thresholds": None,
        "num_training_samples": _num_samples(model, training),
        "rounds": [report],
        "evaluations": [],
        "one_pass": one_pass,
    }
    return json_values(run)


def _num_samples(model: RTLModel, partition: Partition) -> dict[str, int]:
    """Route -> its number of samples."""
    return dict(zip(model.route_names, partition.counts.tolist(), strict=True))


def _backbone_repo(backbone: Any) -> str | None:
    """The repository that a backbone was loaded from, if it is in the cache. The name of a folder stays private."""
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


def _or_none(value: Any) -> Any:
    """`None` in place of `False` or what is empty, since both mean off. The number 0 is a choice."""
    return value if type(value) is int else value or None


def _metrics(metrics: Mapping[str, float], prefix: str, prefixes: Sequence[str]) -> dict[str, float]:
    """The metrics of one evaluation set, without its prefix. Another set's prefix may start with this prefix."""
    longer = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    return {
        name.removeprefix(prefix): value
        for name, value in without_times(metrics).items()
        if name.startswith(prefix) and not (longer and name.startswith(longer))
    }


def without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without those that differ between two evaluations of the same model on the same data."""
    return {name: value for name, value in metrics.items() if not name.endswith(_TIMES)}
