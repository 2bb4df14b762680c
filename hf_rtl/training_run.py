"""What is known of the run that a model comes from, in a file beside it, for its model card."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import TrainerCallback

from .configuration_rtl import VERSION
from .files import write_json
from .modeling_rtl import RTLModel
from .partition_rules import RULE_FILE, TENSORS_FILE, remove_unfitting_rule, save_rule
from .randomness import surroundings
from .ticket_files import base_of
from .training_args import EXTRACTION_FIELDS, RETRAINING_FIELDS, RTLTrainingArguments


FILE = "training_run.json"
ARGUMENTS_FILE = "training_args.json"  # all of them, which a trainer saves beside the final model

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


class ModelCardCallback(TrainerCallback):
    """Collects, when a joint retraining begins, what a model card says of where and with what it ran."""

    surroundings: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
        self.surroundings = {
            "hf_rtl": VERSION,
            **{name: module.__version__ for name, module in modules.items()},
            "python": platform.python_version(),
            **surroundings(args.device),
            "num_processes": args.world_size,
        }


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
        "model": _identity(model),
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


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    write_json(folder / FILE, run)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `write_run` wrote; `None` if nothing is there."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else None


def copy_run(model: RTLModel, folder: Path, *, token: bool | str | None) -> None:
    """
    Writes into `folder` what is known of the run that `model` comes from, unless it has changed since: after a
    training its own, else what lies beside the weights that it was loaded from. Likewise the rule of the partition,
    unless the model has other routes since.
    """
    _copy_rule(model, folder, token)
    if model.training_run is not None:
        if is_of(model.training_run, model):
            write_run(folder, model.training_run)
        return
    file = _loaded_with(model, FILE, token)
    if file is not None and is_of(json.loads(file.read_text()), model):
        shutil.copy(file, folder / FILE)
        arguments = _loaded_with(model, ARGUMENTS_FILE, token)
        if arguments is not None:
            shutil.copy(arguments, folder / ARGUMENTS_FILE)


def _copy_rule(model: RTLModel, folder: Path, token: bool | str | None) -> None:
    if model.partition_rule is not None:
        save_rule(folder, model.partition_rule)
    elif model.training_run is None:
        for name in (RULE_FILE, TENSORS_FILE):
            file = _loaded_with(model, name, token)
            if file is not None:
                shutil.copy(file, folder / name)
    remove_unfitting_rule(folder, model.route_names)


def _loaded_with(model: RTLModel, name: str, token: bool | str | None) -> Path | None:
    """A file of the folder, or of the commit on the Hub, that a model was loaded from; `None` if it is not there."""
    source = model.name_or_path
    if model.loaded_commit is None:
        file = Path(source, name)
        return file if source and file.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=model.loaded_commit, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError):  # also of a repository that is gone, or not for this token
        return None


def is_of(run: Mapping[str, Any], model: RTLModel) -> bool:
    """Whether `model` is the one that the run ended with, not with other masks or weights."""
    return run["model"] == _identity(model)


def _identity(model: RTLModel) -> dict[str, Any]:
    return {"masks": model.mask_bank.fingerprint(), "weights": base_of(model)["fingerprint"]}


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
