"""What a callback is told of a run beside what the Trainer tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from .mask_bank import MaskBank
from .plan import Round
from .run_directory import RunDirectory
from .training_args import RTLTrainingArguments


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


def listeners(callbacks: Sequence[TrainerCallback]) -> list[RTLTrainerCallback]:
    """Those of `callbacks` that are to be told of tickets."""
    return [callback for callback in callbacks if isinstance(callback, RTLTrainerCallback)]


def tell_of_tickets(
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
    banks = [_bank_after(event, bank, run_directory) for event in round_.events[:-1]]
    names = bank.route_names
    banks.append(MaskBank.from_masks(bank.weight_names, {name: masks[k] for k, name in enumerate(names)}))
    figures: dict[str, float] = {}
    control.should_training_stop = False
    for callback in callbacks:
        callback.on_tickets_found(args, state, control, round=round_, banks=banks, figures=figures)
    return figures, control.should_training_stop


def _bank_after(event: int, bank: MaskBank, run_directory: RunDirectory) -> MaskBank:
    """The masks of all routes after a prune event, which are on disk."""
    after = MaskBank(list(zip(bank.weight_names, bank.shapes, strict=True)), bank.route_names)
    for route in range(bank.num_routes):
        masks = run_directory.load_masks(event, route, bank.shapes)
        if masks is None:
            raise RuntimeError(
                f"{str(run_directory.mask_file(event, route))!r} cannot be read, though it has been written. The same "
                "command continues the run."
            )
        after[route] = masks
    return after
