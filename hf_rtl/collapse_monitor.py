"""A callback that watches the tickets of a run for collapse, by their masks alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from .analysis import Change, TicketSimilarity, detect_collapse, ticket_similarity
from .callbacks import RTLTrainerCallback
from .mask_bank import MaskBank
from .plan import Round


logger = logging.getLogger(__name__)


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
