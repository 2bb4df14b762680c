"""What a prune event removes: the criterion, granularity and scope of the arguments, for one backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..modeling.modeling_rtl import RTLModel
from ..modeling.units import UnitLayer
from ..pruning import prune_units, round_schedule
from .activity import Sums, add_up, input_squares
from .ranking import (
    prune_weights,
    readers,
    surviving_units,
    unit_scores,
    units_to_prune,
    weight_scores,
    without_units,
)
from .ticket_trainer import TicketTrainer
from .training_args import RTLTrainingArguments


@dataclass(frozen=True)
class PruneRule:
    """
    What the prune events of a run remove.

    Args:
        args ([`RTLTrainingArguments`]): those that begin with `prune_` are read.
        weight_names (`list[str]`): the prunable weights, in the bank's order.
        num_weights (`int`): their number of elements.
        layers (`list[UnitLayer]`): the layers of units that events remove; none for single weights.
    """

    args: RTLTrainingArguments
    weight_names: list[str]
    num_weights: int
    layers: list[UnitLayer]

    @classmethod
    def of(cls, model: RTLModel, args: RTLTrainingArguments) -> PruneRule:
        """The rule for a model. Raises `ValueError` if its backbone has no units of the granularity of `args`."""
        bank = model.mask_bank
        return cls(args, bank.weight_names, bank.num_weights, _find_layers(model, args.prune_granularity))

    @property
    def num_parts(self) -> int:
        """The number of units, or of weights: what targets and events are shares of."""
        return sum(layer.num_units for layer in self.layers) or self.num_weights

    def schedule(self, target_sparsity: Sequence[float]) -> list[list[int]]:
        """The numbers of units, or of weights, that are kept; see [`round_schedule`]."""
        return round_schedule(
            self.num_parts,
            target_sparsity,
            prune_schedule=self.args.prune_schedule,
            prune_amount=self.args.prune_amount,
            counted=self.args.prune_granularity,
        )

    def prune(
        self,
        trainer: TicketTrainer,
        weights: Sequence[Tensor],
        mask: Sequence[Tensor],
        num_kept: int,
        make_batches: Callable[[], Iterable[dict[str, Any]]],
    ) -> list[Tensor]:
        """
        The mask after a prune event.

        Args:
            trainer ([`TicketTrainer`]): its network is as training left it.
            weights (`Sequence[Tensor]`), mask (`Sequence[Tensor]`): the trained weights and the mask before, on the
                CPU.
            num_kept (`int`): the number of units, or of weights, to keep.
            make_batches (`Callable`): makes the batches to measure activities on, not yet on the device.

        Raises:
            FloatingPointError: activities are not finite.
            ValueError: scores are not finite, or a layer would keep no unit.
        """
        network, found = trainer.network, dict(zip(self.weight_names, weights, strict=True))
        sums = None
        if self.args.prune_criterion == "activity":
            sums = self.measure(network, map(trainer.prepare, make_batches()), trainer.autocast())
        if self.layers:
            return self._prune_units(found, mask, num_kept, sums)
        return prune_weights(
            network,
            found,
            mask,
            num_kept=num_kept,
            scope=self.args.scope,
            scores=None if sums is None else weight_scores(network, found, sums),
            reference=[trainer.theta0[name].cpu() for name in self.weight_names],
        )

    def _prune_units(
        self, weights: dict[str, Tensor], mask: Sequence[Tensor], num_kept: int, sums: Sums | None
    ) -> list[Tensor]:
        masks, layers = dict(zip(self.weight_names, mask, strict=True)), self.layers
        try:
            kept = prune_units(
                unit_scores(weights, layers, sums),
                surviving_units(masks, layers),
                sparsity=1 - num_kept / self.num_parts,
                scope=self.args.scope,
                round_to=self.args.prune_round_to,
                names=[layer.name for layer in layers],
            )
        except ValueError as error:
            raise ValueError(f"{error} (Here `target_sparsity` and `prune_scope` decide them.)") from error
        return list(without_units(masks, layers, kept).values())

    def measure(self, network: nn.Module, inputs: Iterable[dict[str, Any]], autocast: AbstractContextManager) -> Sums:
        """
        The activity of what is ranked, in evaluation mode and without padding: the sums of the squared inputs of
        layers. `inputs` are on the device.

        Raises:
            FloatingPointError: an input of a layer is not finite.
            ValueError: the inputs of a layer cannot be measured.
        """
        # Only an encoder-decoder makes inputs of labels. Others would compute a loss, which may not be their own.
        takes_labels = network.config.is_encoder_decoder  # type: ignore[union-attr]
        given = ({name: value for name, value in each.items() if takes_labels or name != "labels"} for each in inputs)
        names = readers(self.layers) or self.weight_names
        try:
            with autocast:
                sums = add_up(input_squares(network, names, given, per_weight=not self.layers))
        except ValueError as error:
            raise ValueError(f"`prune_criterion` = 'activity': {error}") from error
        for name, (squares, _) in sums.items():
            if not squares.isfinite().all():
                raise FloatingPointError(
                    f"what the layer of {name} is given is not finite, so its activity cannot be ranked; lower "
                    "`learning_rate`, or check the data."
                )
        return sums


def _find_layers(model: RTLModel, granularity: str) -> list[UnitLayer]:
    if granularity == "weight":
        return []
    try:
        model.unit_layers()
    except ValueError as error:
        raise ValueError(
            f"`prune_granularity` = {granularity!r} needs the units of the backbone: {error} Call "
            "`model.unit_layers(example_inputs)` with them before the trainer is made."
        ) from error
    return units_to_prune(model, granularity, argument="prune_granularity")
