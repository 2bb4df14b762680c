"""The plan of a training run, known before the run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..modeling.units import UnitLayer


@dataclass(frozen=True)
class Round:
    """
    One extraction over all routes, and the joint retraining that follows it.

    Args:
        index (`int`): from 0; the random streams of joint retraining depend on it.
        name (`str`): name of its folder.
        sparsity (`float`): sparsity at the end of the round, a share of the weights, or of the units of `layers`.
        kept (`list[int]`): number of weights that every ticket keeps after each prune event of the round; with
            `layers` the number of their units, which layers round.
        first_event (`int`): number of its first event, counted over the whole run.
        retrained (`bool`): whether joint retraining follows.
        layers (`Sequence[UnitLayer]`): the layers whose units are removed; none for single weights.
    """

    index: int
    name: str
    sparsity: float
    kept: list[int]
    first_event: int
    retrained: bool
    layers: Sequence[UnitLayer] = field(default=(), repr=False)

    @property
    def events(self) -> range:
        """Numbers of its prune events."""
        return range(self.first_event, self.first_event + len(self.kept))


@dataclass(frozen=True)
class Plan:
    """
    The rounds of a run, and the sizes that decide its length.

    Args:
        rounds (`list[Round]`): the rounds in order.
        num_weights (`int`): number of prunable weights.
        route_sizes (`dict[str, int]`): number of training samples per route.
        extraction_steps (`list[int]`): steps of the training before a prune event, per route.
        retraining_steps (`int`): optimizer steps of one joint retraining.
    """

    rounds: list[Round]
    num_weights: int
    route_sizes: dict[str, int]
    extraction_steps: list[int]
    retraining_steps: int

    @property
    def num_events(self) -> int:
        return sum(len(round_.kept) for round_ in self.rounds)

    @property
    def num_trainings(self) -> int:
        """Number of extraction trainings, one per route and event, plus number of joint retrainings."""
        return self.num_events * len(self.route_sizes) + sum(round_.retrained for round_ in self.rounds)

    @property
    def num_steps(self) -> int:
        retrainings = sum(round_.retrained for round_ in self.rounds)
        return self.num_events * sum(self.extraction_steps) + retrainings * self.retraining_steps


def make_rounds(
    schedule: list[list[int]],
    target_sparsity: list[float],
    *,
    retrain_every_round: bool,
    layers: Sequence[UnitLayer] = (),
) -> list[Round]:
    """Makes the rounds of the counts that `pruning.round_schedule` returns, with numbered rounds and events."""
    rounds: list[Round] = []
    first_event = 0
    for index, (sparsity, kept) in enumerate(zip(target_sparsity, schedule, strict=True)):
        last = index == len(schedule) - 1
        name = f"round-{index + 1:02d}-sparsity-{sparsity:g}"
        retrained = retrain_every_round or last
        rounds.append(Round(index, name, sparsity, kept, first_event, retrained=retrained, layers=layers))
        first_event += len(kept)
    return rounds
