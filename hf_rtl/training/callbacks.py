"""What a callback is told of a run beside what the Trainer tells."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..analysis import Change, TicketSimilarity, detect_collapse, ticket_similarity
from ..modeling.configuration_rtl import VERSION
from ..modeling.mask_bank import MaskBank
from .plan import Round
from .randomness import numerics_environment
from .run_directory import RunDirectory
from .training_args import RTLTrainingArguments


logger = logging.getLogger(__name__)


class RTLTrainerCallback(TrainerCallback):
    """A `TrainerCallback` with one event more, for those given to [`RTLTrainer`]."""

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
        The tickets of a round have been found and are to be retrained jointly.

        Called on process 0 alone, whose word counts for all, for every round in order; also for those that a continued
        run finds done, so what a callback concludes from masks needs no saving.

        Setting `control.should_training_stop` ends the run: this round is not retrained, and the one before, retrained
        if it was not, becomes the last. In the first round it has no effect, since there is nothing to keep.

        Args:
            round ([`Round`]): its `index`, `name` and `sparsity`.
            banks (`Sequence[MaskBank]`): the masks after each of the round's prune events; the last are those of the
                round. To sparsity 0 there is no event, and these are all there is.
            figures (`dict[str, float]`): what is put here is logged, and added to the round's report, if it is
                retrained.
        """


def rtl_callbacks(callbacks: Sequence[TrainerCallback]) -> list[RTLTrainerCallback]:
    """Those of `callbacks` that are to be told of tickets."""
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
    Calls `on_tickets_found` of `callbacks`; gives their figures, and whether one asks to stop.

    Raises:
        RuntimeError: a mask of an earlier event of the round cannot be read from disk.
    """
    banks = [_bank_with(_read_masks(event, bank, run_directory), bank) for event in round_.events[:-1]]
    banks.append(_bank_with(masks, bank))
    figures: dict[str, float] = {}
    control.should_training_stop = False
    for callback in callbacks:
        callback.on_tickets_found(args, state, control, round=round_, banks=banks, figures=figures)
    return figures, control.should_training_stop


def _bank_with(masks: Sequence[Sequence[Tensor]], bank: MaskBank) -> MaskBank:
    """A bank as `bank` with other masks, given as packed rows."""
    other = MaskBank(list(zip(bank.weight_names, bank.shapes, strict=True)), bank.route_names)
    for route, packed in enumerate(masks):
        other.set_packed(route, packed)
    return other


def _read_masks(event: int, bank: MaskBank, run_directory: RunDirectory) -> list[list[Tensor]]:
    """The masks of all routes after a prune event, which are on disk."""
    masks = []
    for route in range(bank.num_routes):
        packed = run_directory.load_mask(event, route)
        if packed is None:
            raise RuntimeError(
                f"{str(run_directory.mask_file(event, route))!r} cannot be read, though it has been written. The same "
                "command continues the run."
            )
        masks.append(packed)
    return masks


class CollapseMonitor(RTLTrainerCallback):
    """
    Measures how alike tickets are as they grow sparser, and warns when that changes sharply, up or down. The paper
    (section 4.4) reports that past some sparsity tickets collapse so, and that accuracy falls at the same time or soon
    after. That no warning came says little: see model_cards/cifar10_collapse.md for runs in which none did.

    It looks at the masks of all prune events as soon as a round's are found, before they are retrained; at nothing
    else, so it needs no labels and no evaluation. What is sharp is said in [`detect_change`], which needs five events.
    A route is warned of once, with the sparsity of the event. Every round's report and log get, for its own masks,

    - `similarity/{route}/jaccard`: mean Jaccard similarity to the other tickets;
    - `similarity/{route}/chance`: what random masks with the same densities in every layer have;
    - `similarity/{route}/excess`: the difference;
    - `similarity/mean`, `similarity/mean_chance`, `similarity/mean_excess`: the means over routes.

    Args:
        stop_on_collapse (`bool`, defaults to `False`): end the run at the first round in which a route changes
            sharply: it is not retrained, and the round before becomes `final/`. (Not at the first round, before which
            there is none.) Continued with the same monitor, a run stops at the same place again; without, it goes on.

    Attributes:
        points (`list[TicketSimilarity]`): one per prune event so far; on process 0.
        changes (`dict[str, Change]`): the routes that have changed sharply; on process 0.

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
        if round.index == 0:  # of a run that begins, or is continued
            self.points, self.changes = [], {}
        self.points += [ticket_similarity(bank) for bank in banks]
        if banks[-1].num_routes > 1:
            figures.update(_figures(self.points[-1]))
        changes = detect_collapse(self.points)
        new = {name: change for name, change in changes.items() if name not in self.changes}
        self.changes = changes
        if new:
            stops = self.stop_on_collapse and round.index > 0
            control.should_training_stop = control.should_training_stop or stops
            logger.warning(f"{_described(new)} {self._advice(round, stops)}")
        self._round_before = round.name

    def _advice(self, round_: Round, stops: bool) -> str:
        if stops:
            return f"The run ends here: {self._round_before!r} is the last round, {round_.name!r} is not retrained."
        if round_.index == 0:
            return (
                "This is in the first round, so no earlier one could be kept; for one, give `target_sparsity` a value "
                "below that."
            )
        return (
            f"Compare {round_.name!r} with {self._round_before!r} before you use it; "
            "`CollapseMonitor(stop_on_collapse=True)` ends a run at the latter."
        )


def _figures(point: TicketSimilarity) -> dict[str, float]:
    figures = {
        "similarity/mean": float(np.mean(point.similarity)),
        "similarity/mean_chance": float(np.mean(point.chance)),
        "similarity/mean_excess": float(np.mean(point.excess)),
    }
    for route, name in enumerate(point.route_names):
        figures[f"similarity/{name}/jaccard"] = float(point.similarity[route])
        figures[f"similarity/{name}/chance"] = float(point.chance[route])
        figures[f"similarity/{name}/excess"] = float(point.excess[route])
    return figures


def _described(changes: dict[str, Change]) -> str:
    listed = [
        f"{name!r} {change.direction} at {change.sparsity:.1%} sparsity ({change.before:.3f} to {change.found:.3f})"
        for name, change in changes.items()
    ]
    return (
        "tickets may have collapsed: their similarity to the others, beyond chance, has changed sharply: "
        f"{', '.join(listed)}. Accuracy often falls with it."
    )


class RunProgress(TrainerCallback):
    """
    Counts the steps of all extractions and all joint retrainings in one bar.

    Shown by rank 0 on a terminal only, and not with `disable_tqdm`.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bar: tqdm | None = None
        self._round = ""

    def start(self, num_steps: int) -> None:
        # `disable=None` is tqdm's word for: quiet unless the output is a terminal.
        self._bar = tqdm(total=num_steps, disable=None if self._show else True, unit="step", dynamic_ncols=True)

    def begin_round(self, name: str) -> None:
        self._round = name

    def begin_route(self, name: str, event: int, num_events: int) -> None:
        self._describe(f"{self._round} · extraction {event}/{num_events} · {name}")

    def step(self, num_steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(num_steps)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._describe(f"{self._round} · joint retraining")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)


class ModelCardCallback(TrainerCallback):
    """Collects, when a joint retraining begins, what a model card says of where and with what it ran."""

    surroundings: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "timm": timm}
        self.surroundings = {
            "hf_rtl": VERSION,
            **{name: module.__version__ for name, module in modules.items()},
            "python": platform.python_version(),
            **numerics_environment(args.device),
            "num_processes": args.world_size,
        }
