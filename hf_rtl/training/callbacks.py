"""Callbacks of a run: the event that `RTLTrainer` adds to those of `Trainer`, and the callbacks that use it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..analysis import Change, TicketSimilarity, detect_collapse, ticket_similarity
from ..modeling.mask_bank import MaskBank
from .plan import Round
from .run_directory import RunDirectory
from .run_report import describe_environment
from .training_args import RTLTrainingArguments


logger = logging.getLogger(__name__)


class RTLTrainerCallback(TrainerCallback):
    """A `TrainerCallback` with one more event, which [`RTLTrainer`] calls."""

    def on_tickets_found(
        self,
        args: RTLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        round: Round,
        banks: Sequence[MaskBank],
        figures: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """
        Called when the tickets of a round have been found, before they are retrained jointly.

        Only process 0 calls it, for every round in order, and its decision holds for all processes. A continued run
        calls it for finished rounds too, so a callback need not save what it concludes from masks.

        Setting `control.should_training_stop` ends the run: this round is not retrained, and the previous round, which
        is retrained if it was not, becomes the last. In the first round it has no effect: no round could be kept.

        Args:
            round ([`Round`]): the round, with its `index`, `name` and `sparsity`.
            banks (`Sequence[MaskBank]`): the masks after each prune event of the round; the last bank is the round's
                result. A round to sparsity 0 has no event, and its only bank is its result.
            figures (`dict[str, float]`): the metrics that a callback adds here are logged, and written into the
                round's report if the round is retrained.
        """


def rtl_callbacks(callbacks: Sequence[TrainerCallback]) -> list[RTLTrainerCallback]:
    """The callbacks that have `on_tickets_found`."""
    return [callback for callback in callbacks if isinstance(callback, RTLTrainerCallback)]


def fire_on_tickets_found(
    callbacks: Sequence[RTLTrainerCallback],
    round_: Round,
    masks: Sequence[list[Tensor]],
    bank: MaskBank,
    run_directory: RunDirectory,
    args: RTLTrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> tuple[dict[str, float], bool]:
    """
    Calls `on_tickets_found` of `callbacks`. Returns their metrics, and whether one of them asks to stop.

    Raises:
        RuntimeError: the mask of an earlier event of the round cannot be read from disk.
    """
    banks = [_bank_with(_read_masks(event, bank, run_directory), bank) for event in round_.events[:-1]]
    banks.append(_bank_with(masks, bank))
    figures: dict[str, float] = {}
    control.should_training_stop = False
    for callback in callbacks:
        callback.on_tickets_found(args, state, control, round=round_, banks=banks, figures=figures)
    return figures, control.should_training_stop


def _bank_with(masks: Sequence[Sequence[Tensor]], bank: MaskBank) -> MaskBank:
    """A bank like `bank`, with the masks that the packed rows `masks` hold."""
    other = MaskBank(list(zip(bank.weight_names, bank.shapes, strict=True)), bank.route_names)
    for route, packed in enumerate(masks):
        other.set_packed(route, packed)
    return other


def _read_masks(event: int, bank: MaskBank, run_directory: RunDirectory) -> list[list[Tensor]]:
    """Reads the masks of all routes after a prune event from disk."""
    masks = []
    for route in range(bank.num_routes):
        packed = run_directory.load_mask(event, route, bank)
        if packed is None:
            raise RuntimeError(
                f"{str(run_directory.mask_file(event, route))!r} cannot be read, although it was written. Run the "
                "same command again to continue the run."
            )
        masks.append(packed)
    return masks


class CollapseMonitor(RTLTrainerCallback):
    """
    Measures how similar tickets are as they become sparser, and warns when the similarity changes sharply, up or down.
    The paper, section 4.4, reports such a change, a collapse, above some sparsity; accuracy falls with it or soon
    after. The absence of a warning proves little: see model_cards/cifar10_collapse.md for runs without one.

    The monitor reads the masks of all prune events of a round, before the round is retrained. It needs no labels and
    no evaluation. [`detect_change`] defines a sharp change; it needs five events. The monitor warns once per route,
    and names the sparsity of the event. It adds these metrics of each round's masks to the round's report and log:

    - `similarity/{route}/jaccard`: mean Jaccard similarity to the other tickets;
    - `similarity/{route}/chance`: the same for random masks with the same densities in every layer;
    - `similarity/{route}/excess`: the difference;
    - `similarity/mean`, `similarity/mean_chance`, `similarity/mean_excess`: the means over routes.

    Args:
        stop_on_collapse (`bool`, defaults to `False`): end the run at the first round in which a route changes
            sharply. This round is not retrained, and the previous one becomes `final/`. A run never ends in its first
            round. A run continued with the same monitor stops at the same round; without the monitor it goes on.

    Attributes:
        points (`list[TicketSimilarity]`): one per prune event so far; process 0 only.
        changes (`dict[str, Change]`): the routes that have changed sharply; process 0 only.

    Example:
        >>> trainer = RTLTrainer(model, args, train_dataset=train, callbacks=[CollapseMonitor(stop_on_collapse=True)])
    """

    def __init__(self, *, stop_on_collapse: bool = False) -> None:
        self.stop_on_collapse = stop_on_collapse
        self.points: list[TicketSimilarity] = []
        self.changes: dict[str, Change] = {}
        self._round_before = ""

    def on_tickets_found(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        round: Round,
        banks: Sequence[MaskBank],
        figures: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if round.index == 0:  # a run starts or continues here
            self.points, self.changes = [], {}
        self.points += [ticket_similarity(bank) for bank in banks]
        if banks[-1].num_routes > 1:
            figures.update(_similarity_metrics(self.points[-1]))
        changes = detect_collapse(self.points)
        new = {name: change for name, change in changes.items() if name not in self.changes}
        self.changes = changes
        if new:
            stops = self.stop_on_collapse and round.index > 0
            control.should_training_stop = control.should_training_stop or stops
            logger.warning(f"{_describe_changes(new)} {self._advice(round, stops)}")
        self._round_before = round.name

    def _advice(self, round_: Round, stops: bool) -> str:
        if stops:
            return f"The run ends here: {self._round_before!r} is the last round, {round_.name!r} is not retrained."
        if round_.index == 0:
            return (
                "This is the first round, so there is no earlier round to keep; to get one, add a lower value to "
                "`target_sparsity`."
            )
        return (
            f"Compare {round_.name!r} with {self._round_before!r} before you use it; "
            f"`CollapseMonitor(stop_on_collapse=True)` would end the run with {self._round_before!r}."
        )


def _similarity_metrics(point: TicketSimilarity) -> dict[str, float]:
    metrics = {
        "similarity/mean": float(np.mean(point.similarity)),
        "similarity/mean_chance": float(np.mean(point.chance)),
        "similarity/mean_excess": float(np.mean(point.excess)),
    }
    for route, name in enumerate(point.route_names):
        metrics[f"similarity/{name}/jaccard"] = float(point.similarity[route])
        metrics[f"similarity/{name}/chance"] = float(point.chance[route])
        metrics[f"similarity/{name}/excess"] = float(point.excess[route])
    return metrics


def _describe_changes(changes: dict[str, Change]) -> str:
    listed = [
        f"{name!r} {change.direction} at {change.sparsity:.1%} sparsity ({change.before:.3f} to {change.found:.3f})"
        for name, change in changes.items()
    ]
    return (
        "tickets may have collapsed: their similarity to the other tickets, beyond chance, has changed sharply: "
        f"{', '.join(listed)}. Accuracy often falls with it."
    )


class ModelCardCallback(TrainerCallback):
    """Collects versions, device and number of processes for the model card when a joint retraining begins."""

    environment: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.environment = describe_environment(args.device, args.world_size)
