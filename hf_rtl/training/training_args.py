"""Arguments of `RTLTrainer`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from ..modeling.checks import check_choice, check_integer, check_number
from ..modeling.configuration_rtl import ROUTERS
from ..modeling.units import GRANULARITIES
from ..pruning import PRUNE_SCHEDULES, PRUNE_SCOPES, UNIT_SCOPES, round_schedule


PRUNE_CRITERIA = ("magnitude", "activity")
# The arguments that decide the masks, together with the model and the data.
EXTRACTION_FIELDS = [
    "target_sparsity",
    "prune_schedule",
    "prune_amount",
    "prune_criterion",
    "prune_granularity",
    "prune_scope",
    "prune_round_to",
    "prune_batches",
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
    "neftune_noise_alpha",
]
# The arguments that decide the retrained weights as well. A run continues only with the same values of both lists.
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

# The lowest allowed values of integer arguments.
_MINIMA = {
    "prune_round_to": 1,
    "prune_batches": 1,
    "extraction_steps": 0,
    "extraction_threads": 1,
    "route_batch_size": 1,
    "rewind_to": 0,
    "recalibration_batches": 0,
    "competing_epochs": 0,
}
_OPTIONAL = ("extraction_steps",)
_FULL_EVAL = "evaluation would cast the model that training continues with; cast a saved model, and evaluate that"
_OWN_BATCHES = "a batch holds samples of one route, drawn at random"
_LIGER = "Liger knows a model by its type, and that of a routed model is 'rtl', so it would change nothing"
# Arguments of which only the default is allowed, with the reason.
_UNSUPPORTED = {
    "label_smoothing_factor": "training uses the backbone's own loss",
    "auto_find_batch_size": "batch size and tickets would depend on the machine; set `route_batch_size`",
    "save_only_model": "an interrupted run could not continue; the model of every round is saved anyway",
    "save_on_each_node": "all machines share one folder and write into it",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "ignore_data_skip": "a continued run would train on other batches than an uninterrupted one",
    "enable_jit_checkpoint": "a run that it ends would count as complete; without it, any interrupted run continues",
    "dataloader_drop_last": "training batches are always full, and evaluation reads every sample",
    "dataloader_in_order": "batches must come in the order of their routes and samples",
    "train_sampling_strategy": _OWN_BATCHES,
    "length_column_name": _OWN_BATCHES,
    "optim_target_modules": "optimizers with parameter groups of their own cannot be masked",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
}


def default_scope(granularity: str) -> str:
    """What is ranked together where `prune_scope` is left out."""
    return "global" if granularity == "weight" else "layer"


@dataclass
class RTLTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the arguments of [`RTLTrainer`]. `num_train_epochs`, `max_steps`, `eval_strategy`,
    `save_strategy` and the learning rate's schedule apply to the joint retraining of each round; extraction uses the
    constant `learning_rate`.

    Some defaults differ from those of `TrainingArguments`, so that the method is not changed silently: a constant
    learning rate of 1e-4, no clipping, 10 epochs, no filtering of NaN losses.

    Raises:
        TypeError, ValueError: a value of a wrong type or out of range, or an argument that is not supported.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of extraction and joint retraining."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of joint retraining in a round."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of joint retraining."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not clip."})
    optim: str = field(
        default="adamw_torch",
        metadata={"help": "Optimizer. adamw_torch and sgd have a fast masked step; all others have a slower one."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses in the log; slow."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Number of Trainer checkpoints kept per round."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search the graph for parameters without a gradient in a step; slow."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore the state of callbacks, such as early stopping, in a continued run."}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label inputs."})

    target_sparsity: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75],
        metadata={
            "help": "Sparsity at the end of each round, ascending, in [0, 1). One value gives one round. It is a "
            "share of the prunable weights; with prune_granularity neuron or channel, of these units."
        },
    )
    prune_schedule: str = field(
        default="geometric",
        metadata={
            "help": "An event removes a part of the kept weights (geometric), of all (linear), or a count (constant)."
        },
    )
    prune_amount: float = field(
        default=0.2,
        metadata={"help": "Fraction or number of weights, or units, that a prune event removes; see prune_schedule."},
    )
    prune_criterion: str = field(
        default="magnitude",
        metadata={
            "help": "What an event ranks by, after its training: magnitude, or activity on the route's training data: "
            "how much a weight or unit does there."
        },
    )
    prune_granularity: str = field(
        default="weight",
        metadata={
            "help": "What an event removes: single weights (weight), or whole units, so that extracted tickets are "
            "smaller models: neuron of feed-forward blocks, channel between convolutions."
        },
    )
    prune_scope: str | None = field(
        default=None,
        metadata={
            "help": "What is ranked together: all (global), each layer (layer), each output (row, for weights), or "
            "all by the spread of their layer (global_normalised, for weights). Default: global for weights, layer "
            "for units. With prune_criterion activity, row is recommended for weights: activities of layers differ in "
            "scale.",
        },
    )
    prune_round_to: int = field(
        default=8,
        metadata={"help": "With units and prune_scope layer, layers keep a multiple of this number of units."},
    )
    prune_batches: int = field(
        default=8,
        metadata={
            "help": "Batches of a route, at most one epoch, on which prune_criterion activity is measured in an event."
        },
    )
    extraction_epochs: float = field(
        default=1.0, metadata={"help": "Epochs over a route's samples before each prune event."}
    )
    extraction_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps before each prune event, instead of extraction_epochs. 0: no training; masks are chosen "
            "from the initial weights, so by magnitude all tickets are the same, and by activity they differ."
        },
    )
    extraction_threads: int = field(
        default=1,
        metadata={
            "help": "CPU threads of extraction in each process. Masks depend on it through rounding; for speed, start "
            "one process per core instead."
        },
    )
    extraction_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of extracted masks, which runs that differ only in retraining can share."},
    )
    route_batch_size: int = field(
        default=64, metadata={"help": "Samples of one route per batch, over all processes, in every training."}
    )
    route_column: str | None = field(
        default=None,
        metadata={"help": "Column with the route of a sample. Default: the label column; none for a single route."},
    )
    retrain_every_round: bool = field(
        default=True, metadata={"help": "Retrain, evaluate and save in every round, not only in the last."}
    )
    rewind_to: int = field(
        default=0,
        metadata={"help": "Rewind to the weights after this many dense steps on all data; 0: to the initial weights."},
    )
    rewind_to_current: bool = field(
        default=False,
        metadata={"help": "Take the weights of a model that was trained or holds tickets as θ0; else it is refused."},
    )
    allow_disconnected: bool = field(
        default=False,
        metadata={
            "help": "Go on if pruning cuts a ticket's output from its input, also with a router that is useless then."
        },
    )
    seed_transforms: bool = field(
        default=True,
        metadata={"help": "Seed random transforms per sample. Without transforms, turn it off: batches load faster."},
    )
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of each route's training data held out to fit thresholds and router."}
    )
    competing_epochs: int = field(
        default=0,
        metadata={
            "help": "Last epochs of retraining, in which membership tickets compete: all score the same samples, "
            "and the loss is the cross-entropy of a softmax over their scores."
        },
    )
    router: str = field(
        default="given",
        metadata={"help": "Router to fit on held-out data after retraining: score, centroid, entropy; given: none."},
    )
    router_threshold: float = field(
        default=0.0, metadata={"help": "Inputs whose best route is less probable than this take router_fallback."}
    )
    router_fallback: str | None = field(
        default=None, metadata={"help": "Route of inputs below router_threshold. Default: the union of all tickets."}
    )
    debug_determinism: bool = field(
        default=False,
        metadata={"help": "Search for one ticket per round again on another process; stop if its mask differs."},
    )
    recalibration_batches: int = field(
        default=50,
        metadata={
            "help": "Number of training batches from which the running statistics of every ticket, and of the union "
            "of all, are taken anew after joint retraining. 0: those of tickets stay as training left them, as in the "
            "paper."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_sparsity, (int, float)):
            self.target_sparsity = [float(self.target_sparsity)]
        if self.prune_scope is None:
            self.prune_scope = default_scope(self.prune_granularity)
        choices = {
            "prune_schedule": PRUNE_SCHEDULES,
            "prune_criterion": PRUNE_CRITERIA,
            "prune_granularity": GRANULARITIES,
            "prune_scope": PRUNE_SCOPES,
            "router": ROUTERS,
        }
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.prune_granularity != "weight" and self.prune_scope not in UNIT_SCOPES:
            raise ValueError(
                f"`prune_scope` = {self.prune_scope!r} ranks single weights, but `prune_granularity` = "
                f"{self.prune_granularity!r} removes whole units; choose 'layer' or 'global', or leave it out."
            )
        # Any number of weights will do: this call raises for targets and amounts out of range.
        round_schedule(2**24, self.target_sparsity, prune_schedule=self.prune_schedule, prune_amount=self.prune_amount)
        for name, minimum in _MINIMA.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_integer(name, getattr(self, name), minimum=minimum)
        for name in ("extraction_epochs", "calibration_fraction", "router_threshold"):
            check_number(name, getattr(self, name))
        if self.max_steps != -1:
            check_integer("max_steps", self.max_steps, minimum=1)
        if not 0 <= check_number("num_train_epochs", self.num_train_epochs) < math.inf:
            raise ValueError(f"`num_train_epochs` must not be negative, got {self.num_train_epochs}.")
        if not 0 < self.extraction_epochs < math.inf:
            raise ValueError(f"`extraction_epochs` must be positive, got {self.extraction_epochs}.")
        if not 0 <= self.calibration_fraction < 1:
            raise ValueError(f"`calibration_fraction` must be in [0, 1), got {self.calibration_fraction}.")
        if not 0 <= self.router_threshold <= 1:
            raise ValueError(f"`router_threshold` must be in [0, 1], got {self.router_threshold}.")
        if self.per_device_train_batch_size != type(self).per_device_train_batch_size:
            raise ValueError(
                f"`per_device_train_batch_size` = {self.per_device_train_batch_size} is not supported: all processes "
                "share a batch of one route. Set `route_batch_size`, its size over all processes."
            )
        for argument in fields(self):
            name, value = argument.name, getattr(self, argument.name)
            if name in _UNSUPPORTED and value != argument.default:
                raise ValueError(
                    f"`{name}` = {value!r} is not supported: {_UNSUPPORTED[name]}. Leave it at {argument.default!r}."
                )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("`dataloader_persistent_workers` needs workers: set `dataloader_num_workers`, as to 2.")
        super().__post_init__()
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` of `accelerator_config` is not supported: every process reads its own part of a "
                "batch."
            )
        if self.competing_epochs:
            self._check_competition()
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raises `ValueError` unless the schedule of the learning rate takes what is given to it."""
        kind, given = SchedulerType(self.lr_scheduler_type).value, self.lr_scheduler_kwargs or {}
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]).parameters
        unknown = [] if "kwargs" in known else [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"`lr_scheduler_kwargs` has {unknown[0]!r}, which `lr_scheduler_type` = {kind!r} lacks.")
        optimizer, num_steps = torch.optim.SGD([torch.zeros(1)], lr=1.0), 10_000
        num_warmup_steps = self.get_warmup_steps(num_steps)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, num_warmup_steps, num_steps, given)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`lr_scheduler_kwargs` = {given} do not suit `lr_scheduler_type` = {kind!r}: {error}"
            ) from error
        if num_warmup_steps and optimizer.param_groups[0]["lr"] == 1.0:
            raise ValueError(
                f"`warmup_steps` = {self.warmup_steps} has no effect on `lr_scheduler_type` = {kind!r}, which does "
                "not warm up; choose another, for example 'constant_with_warmup'."
            )

    def _check_competition(self) -> None:
        if self.max_steps > 0:
            raise ValueError(
                f"`competing_epochs` = {self.competing_epochs} are the last of `num_train_epochs`, which "
                f"`max_steps` = {self.max_steps} overrides; leave `max_steps` out."
            )
        if self.num_train_epochs != int(self.num_train_epochs) or self.competing_epochs > self.num_train_epochs:
            raise ValueError(
                f"`competing_epochs` = {self.competing_epochs} must be at most `num_train_epochs`, which must be a "
                f"whole number, got {self.num_train_epochs}."
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "`competing_epochs` needs the masks of all routes at once, but `gradient_checkpointing` those of one; "
                "choose one of them."
            )

    @property
    def scope(self) -> str:
        """`prune_scope`, which has a value in all arguments."""
        assert self.prune_scope is not None
        return self.prune_scope

    def select_values(self, names: Sequence[str]) -> dict[str, Any]:
        """The named arguments as plain JSON values."""
        values = self.to_dict()
        return {name: values[name] for name in names}
