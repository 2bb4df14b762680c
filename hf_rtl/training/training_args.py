"""Arguments of `RTLTrainer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..modeling.checks import check_choice, check_integer, check_number
from ..modeling.configuration_rtl import ROUTERS
from ..pruning import PRUNE_SCHEDULES, PRUNE_SCOPES, round_schedule


# What decides the masks that come out of extraction, beside the model and the data.
EXTRACTION_FIELDS = [
    "target_sparsity",
    "prune_schedule",
    "prune_amount",
    "prune_scope",
    "extraction_epochs",
    "extraction_steps",
    "extraction_threads",
    "route_batch_size",
    "rewind_to",
    "seed_transforms",
    "calibration_fraction",
    "seed",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
]
# What decides the retrained weights as well. A run directory continues only with the same values of all these.
RETRAINING_FIELDS = [
    "retrain_every_round",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "recalibration_batches",
    "competing_epochs",
    "router",
    "router_threshold",
    "router_fallback",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
]

# The least that whole numbers may be.
_MINIMA = {
    "extraction_steps": 1,
    "extraction_threads": 1,
    "route_batch_size": 1,
    "rewind_to": 0,
    "recalibration_batches": 1,
    "competing_epochs": 0,
}
_OPTIONAL = ("extraction_steps",)
_UNSUPPORTED = {
    "label_smoothing_factor": "the backbone's own loss is used",
    "auto_find_batch_size": "a batch size that depends on the machine gives other tickets; set `route_batch_size`",
    "save_only_model": "an interrupted run could not continue; the models of all rounds are saved apart",
    "save_on_each_node": "all machines write into one folder, which they share",
    "ignore_data_skip": "a continued run would see other batches than one that was not interrupted",
}


@dataclass
class RTLTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what a run of rounds needs. `num_train_epochs`, `max_steps`, `eval_strategy`,
    `save_strategy` and the learning rate's schedule are those of each round's joint retraining; extraction runs at
    the constant `learning_rate`.

    Defaults that differ from `TrainingArguments`, because the method's would be changed silently otherwise: a constant
    learning rate of 1e-4, no clipping, 10 epochs, no filtering of NaN losses.

    Raises:
        ValueError: a value out of range, or an argument that has no meaning here.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of extraction and joint retraining."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of joint retraining in a round."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of joint retraining."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not clip."})
    optim: str = field(
        default="adamw_torch",
        metadata={"help": "adamw_torch and sgd have our own masked step; others are masked from outside, slower."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses; costs a sync per step."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Trainer checkpoints kept inside a round."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Search the graph for parameters that a step leaves out; slow."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Continue callbacks, as early stopping, where they were."}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label arguments."})

    target_sparsity: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75],
        metadata={"help": "Sparsity that each round ends at, ascending in [0, 1). One value makes one round."},
    )
    prune_schedule: str = field(
        default="geometric",
        metadata={
            "help": "An event removes a fraction of the survivors (geometric), of all (linear), or a count (constant)."
        },
    )
    prune_amount: float = field(
        default=0.2, metadata={"help": "How much a prune event removes, in the unit of prune_schedule."}
    )
    prune_scope: str = field(
        default="global", metadata={"help": "Ranks magnitudes together (global), per layer, or global_normalised."}
    )
    extraction_epochs: float = field(
        default=1.0, metadata={"help": "Epochs over a route's samples before each prune event."}
    )
    extraction_steps: int | None = field(
        default=None, metadata={"help": "Steps before each prune event, instead of extraction_epochs."}
    )
    extraction_threads: int = field(
        default=1,
        metadata={
            "help": "CPU threads of extraction in each process; masks depend on it in rounding. For speed, start a "
            "process per core instead."
        },
    )
    extraction_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of extracted masks, to share between runs that differ in retraining only."},
    )
    route_batch_size: int = field(
        default=64, metadata={"help": "Samples of one route per batch, over all processes, in both phases."}
    )
    route_column: str | None = field(
        default=None,
        metadata={"help": "Column that names a sample's route. Default: the label column; none for a single route."},
    )
    retrain_every_round: bool = field(
        default=True, metadata={"help": "Retrain, evaluate and save after every round, not only after the last."}
    )
    rewind_to: int = field(
        default=0,
        metadata={"help": "Rewind to the weights after this many dense steps on all data; 0: to the initial ones."},
    )
    allow_disconnected: bool = field(
        default=False,
        metadata={
            "help": "Go on when pruning cuts a ticket's output from its input, and with a router that is no help then."
        },
    )
    seed_transforms: bool = field(
        default=True,
        metadata={"help": "Seed random transforms per sample. Turn off for data without any: fetches whole batches."},
    )
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Part of each route's training data held out to fit thresholds and router on."}
    )
    competing_epochs: int = field(
        default=0,
        metadata={
            "help": "The last epochs of joint retraining in which membership tickets compete: all score the same "
            "samples, and the loss is that of one softmax over their scores."
        },
    )
    router: str = field(
        default="given",
        metadata={"help": "Router to fit after joint retraining, on data held out: score, centroid or entropy."},
    )
    router_threshold: float = field(
        default=0.0, metadata={"help": "Inputs whose likeliest route is less probable take router_fallback."}
    )
    router_fallback: str | None = field(
        default=None, metadata={"help": "Route that doubtful inputs take. Default: the union of all tickets."}
    )
    debug_determinism: bool = field(
        default=False,
        metadata={"help": "Recompute one ticket a round on another process, and stop if it comes out different."},
    )
    recalibration_batches: int = field(
        default=50, metadata={"help": "Batches from which the statistics of the union of tickets are taken."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_sparsity, (int, float)):
            self.target_sparsity = [float(self.target_sparsity)]
        choices = {"prune_schedule": PRUNE_SCHEDULES, "prune_scope": PRUNE_SCOPES, "router": ROUTERS}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        # Raises for targets and amounts out of range, whatever the model.
        round_schedule(2**24, self.target_sparsity, schedule=self.prune_schedule, amount=self.prune_amount)
        for name, minimum in _MINIMA.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_integer(name, getattr(self, name), minimum=minimum)
        for name in ("extraction_epochs", "calibration_fraction", "router_threshold"):
            check_number(name, getattr(self, name))
        if not 0 < self.extraction_epochs < math.inf:
            raise ValueError(f"`extraction_epochs` must be positive, got {self.extraction_epochs}.")
        if not 0 <= self.calibration_fraction < 1:
            raise ValueError(f"`calibration_fraction` must be in [0, 1), got {self.calibration_fraction}.")
        if self.competing_epochs:
            self._check_competition()
        if not 0 <= self.router_threshold <= 1:
            raise ValueError(f"`router_threshold` must be in [0, 1], got {self.router_threshold}.")
        if self.per_device_train_batch_size != type(self).per_device_train_batch_size:
            raise ValueError(
                f"`per_device_train_batch_size` = {self.per_device_train_batch_size} has no meaning here: batches "
                "are of one route and shared by all processes. Set `route_batch_size`, their size over all processes."
            )
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` is not supported: {reason}.")
        super().__post_init__()

    def _check_competition(self) -> None:
        if self.max_steps > 0:
            raise ValueError(
                f"`competing_epochs` = {self.competing_epochs} are the last of `num_train_epochs`, which "
                f"`max_steps` = {self.max_steps} overrides; leave `max_steps` out."
            )
        if self.num_train_epochs != int(self.num_train_epochs) or self.competing_epochs > self.num_train_epochs:
            raise ValueError(
                f"`competing_epochs` = {self.competing_epochs} must be at most `num_train_epochs`, a whole number "
                f"then, got {self.num_train_epochs}."
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "`competing_epochs` needs the masks of all routes at once, and `gradient_checkpointing` those of one; "
                "choose one of them."
            )

    def values_of(self, names: Sequence[str]) -> dict[str, Any]:
        """Some arguments as plain JSON values."""
        values = self.to_dict()
        return {name: values[name] for name in names}
