"""Extraction (paper, Algorithm 1) of all routes: assigns routes to processes, continues from disk, compares masks."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.route_data import RouteData
from ..modeling.hashing import hash_parts
from ..modeling.mask_bank import count_bits
from .plan import Round
from .processes import Heartbeat
from .prune_rule import PruneRule
from .randomness import Stream, reproducible, seeded
from .route_trainer import RouteTrainer
from .run_directory import RunDirectory
from .ticket_trainer import TicketTrainer


logger = logging.getLogger(__name__)


@dataclass
class Extraction:
    """
    The search for tickets (paper, Algorithm 1), with the routes assigned to the processes of a run.

    One process runs all prune events of a route in a plain local loop: no DDP, and no collectives until all routes are
    done. Each finished mask is written to disk at once, so an interrupted run continues from there, on any number of
    processes. Masks depend neither on that number nor on the order of the routes.

    Args:
        trainer ([`RouteTrainer`]): gives data, arguments and the training of single tickets; its model is not changed.
        run_directory ([`RunDirectory`]): the directory that masks are written to.
        heartbeat ([`Heartbeat`]): a context that has been entered.
        theta0 (`dict[str, Tensor]`): θ0, from which every training starts.
        num_steps (`Sequence[int]`): steps of one training, per route.
    """

    trainer: RouteTrainer
    run_directory: RunDirectory
    heartbeat: Heartbeat
    theta0: dict[str, Tensor]
    num_steps: Sequence[int]

    def __post_init__(self) -> None:
        self.args = self.trainer.args
        self.bank = self.trainer.model.mask_bank
        self.rule = PruneRule.of(self.trainer.model, self.args)
        self.processes = self.trainer.processes
        self.progress = self.trainer.progress
        # Created on first use: a process may have no route.
        self._ticket_trainer: TicketTrainer | None = None

    def run(self, round_: Round, masks: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """
        Finds the masks of all routes at the end of a round from those at its start, both as packed rows (see
        `MaskBank.pack`). Masks that are on disk are read, not searched for again.

        Raises:
            FloatingPointError: a loss became NaN or infinite, or pruning cut a ticket's output from its input.
            RuntimeError: the processes do not hold the same masks, or `debug_determinism` found another mask.
        """
        if not round_.kept:
            return list(masks)
        assigned = self.processes.from_rank_zero(self._assign_routes(round_) if self.processes.rank == 0 else None)
        own: dict[int, list[Tensor]] = {}
        with reproducible(self.args.extraction_threads):
            for route in assigned[self.processes.rank]:
                own[route] = self.search(route, round_, masks[route])
        self.heartbeat.meet()
        others = sum(steps for route, steps in enumerate(self.num_steps) if route not in own)
        self.progress.step(len(round_.kept) * others)
        found = self.exchange(own)
        if self.args.debug_determinism:
            self._search_again(round_, masks, found, assigned)
        self._ticket_trainer = None
        return found

    def _assign_routes(self, round_: Round) -> list[list[int]]:
        """The routes of every process, so that all have about the same number of missing steps."""
        missing = [
            sum(self.run_directory.load_mask(event, route, self.bank) is None for event in round_.events)
            for route in range(self.bank.num_routes)
        ]
        steps = [number * steps for number, steps in zip(missing, self.num_steps, strict=True)]
        return assign_routes(steps, self.processes.world_size)

    def search(self, route: int, round_: Round, mask: list[Tensor]) -> list[Tensor]:
        """Runs all prune events of one route in a round. Returns the last mask."""
        name = self.bank.route_names[route]
        for number, (event, num_kept) in enumerate(zip(round_.events, round_.kept, strict=True), start=1):
            self.progress.begin_route(name, number, len(round_.kept))
            pruned = self.run_directory.load_mask(event, route, self.bank)
            if pruned is None:
                pruned, started_from = self.train_and_prune(route, event, mask, num_kept, self.progress.step)
                self.run_directory.save_mask(event, route, pruned, started_from=started_from)
            else:
                self.progress.step(self.num_steps[route])
            mask = pruned
        return mask

    def train_and_prune(
        self, route: int, event: int, mask: list[Tensor], num_kept: int, on_step: Callable[[], None]
    ) -> tuple[list[Tensor], str]:
        """Runs one prune event of a route on packed rows. Returns the new rows, and a hash of the training's start."""
        if self._ticket_trainer is None:
            self._ticket_trainer = self.trainer.ticket_trainer(self.theta0)
        batches = self.trainer.extraction_batches(route, event)
        pruned = train_and_prune(
            self._ticket_trainer,
            self.bank.unpack(mask),
            batches,
            num_kept,
            rule=self.rule,
            scoring_batches=partial(scoring_batches, self.trainer, route, event),
            route=route,
            name=self.bank.route_names[route],
            event=event,
            on_step=on_step,
        )
        return self.bank.pack(pruned), self._ticket_trainer.started_from

    def exchange(self, own: Mapping[int, list[Tensor]]) -> list[list[Tensor]]:
        """Collects the masks of all routes from all processes, and checks that all processes hold the same."""
        packed = {route: torch.cat(rows) for route, rows in own.items()}
        sizes = [-(-shape.numel() // 8) for shape in self.bank.shapes]
        rows = self.processes.merge_routes(packed, self.bank.num_routes, sum(sizes))
        self._check_same(packed, rows)
        return [list(row.split(sizes)) for row in rows]

    def _check_same(self, own: Mapping[int, Tensor], rows: Tensor) -> None:
        made = {route: hash_parts([("", packed)]) for route, packed in own.items()}
        received = [hash_parts([("", row)]) for row in rows]
        everyone = self.processes.gather((made, received))
        for maker, (theirs, _) in enumerate(everyone):
            for route, fingerprint in theirs.items():
                for rank, (_, got) in enumerate(everyone):
                    if got[route] != fingerprint:
                        raise RuntimeError(
                            f"process {rank} has other masks of route {self.bank.route_names[route]!r} "
                            f"({got[route][:16]}…) than process {maker}, which found them ({fingerprint[:16]}…)."
                        )

    def _search_again(
        self, round_: Round, masks: Sequence[list[Tensor]], found: Sequence[list[Tensor]], assigned: list[list[int]]
    ) -> None:
        """Repeats one route's last prune event of a round on the next process, and compares the masks."""
        route = round_.index % self.bank.num_routes
        finder = next(rank for rank, routes in enumerate(assigned) if route in routes)
        rank = (finder + 1) % self.processes.world_size
        name, event = self.bank.route_names[route], round_.events[-1]
        differing = 0
        if self.processes.rank == rank:
            before = masks[route]
            if len(round_.events) > 1:
                loaded = self.run_directory.load_mask(event - 1, route, self.bank)
                if loaded is None:
                    raise RuntimeError(
                        f"process {rank} cannot read the mask of route {name!r} after event {event - 1}."
                    )
                before = loaded
            with reproducible(self.args.extraction_threads):
                again, _ = self.train_and_prune(route, event, before, round_.kept[-1], lambda: None)
            differing = sum(int(count_bits(one ^ two)) for one, two in zip(again, found[route], strict=True))
        self.heartbeat.meet()
        differing = sum(self.processes.gather(differing))
        if differing:
            raise RuntimeError(
                f"`debug_determinism`: process {rank} finds another mask of route {name!r} after prune event {event} "
                f"than process {finder} did: {differing:,} weights differ. Data or computation differ between them."
            )
        if self.processes.rank == 0:
            logger.info(f"Processes {rank} and {finder} find the same mask of route {name!r} after event {event}.")


def train_and_prune(
    trainer: TicketTrainer,
    mask: list[Tensor],
    batches: Iterator[dict[str, Any]],
    num_kept: int,
    *,
    rule: PruneRule,
    scoring_batches: Callable[[], Iterator[dict[str, Any]]],
    route: int,
    name: str,
    event: int,
    on_step: Callable[[], None],
) -> list[Tensor]:
    """
    One prune event: trains a ticket from m ⊙ θ0, then removes the weights with the smallest magnitudes, or what else
    the rule says.

    Args:
        trainer ([`TicketTrainer`]): a trainer that starts from θ0.
        mask (`list[Tensor]`): m, `bool`, one per prunable weight.
        batches (`Iterator`): the batches of the training; without any there is none.
        num_kept (`int`): number of weights to keep, or of units.
        rule ([`PruneRule`]): what is removed.
        scoring_batches (`Callable`): makes the batches that activities are measured on, at least one.
        route (`int`), name (`str`): the route of the ticket.
        event (`int`): number of the event in the run.
        on_step (`Callable`): called after every step.

    Returns:
        The mask after the event.

    Raises:
        FloatingPointError: a loss became NaN or infinite, or pruning cut the ticket's output from its input.
        ValueError: the rule cannot remove so much.
    """
    args, device = rule.args, next(trainer.network.parameters()).device
    last_batch: dict[str, Any] = {}

    def remember_last() -> Iterator[dict[str, Any]]:
        for batch in batches:
            last_batch.update(batch)
            yield batch

    seed = (args.seed, Stream.EXTRACTION, event, route)
    try:
        weights = trainer.train(mask, remember_last(), seed=seed, on_step=on_step)
    except FloatingPointError as error:
        raise FloatingPointError(f"extraction of route {name!r}, prune event {event}: {error}") from None
    # Collators may draw; these draws depend on the event and the route alone.
    with seeded((args.seed, Stream.SCORING, event, route), device):
        try:
            pruned = rule.prune(trainer, weights, mask, num_kept, scoring_batches)
        except (FloatingPointError, ValueError) as error:
            raise type(error)(f"extraction of route {name!r}, prune event {event}: {error}") from error
        shown = last_batch or next(scoring_batches())
    if not args.allow_disconnected and trainer.is_disconnected(pruned, shown):
        raise FloatingPointError(
            f"pruning to {num_kept:,} {args.prune_granularity}s has cut the output of ticket {name!r} from its input. "
            "Lower `target_sparsity`, use `prune_scope='layer'`, or set `allow_disconnected=True` to go on."
        )
    return pruned


def scoring_batches(
    trainer: RouteTrainer, route: int, event: int, data: RouteData | None = None
) -> Iterator[dict[str, Any]]:
    """
    The batches of a route on which a prune event measures activities: `prune_batches`, at most an epoch. They are
    drawn as those of a training are, and do not depend on its length.
    """
    data = trainer.run_data.require_training() if data is None else data
    sampler = data.sampler((Stream.SCORING, event), routes=[route])
    number = min(trainer.args.prune_batches, sampler.num_updates_per_route)
    return islice(trainer.endless_batches(data, sampler), number)


def assign_routes(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """
    Assigns routes to processes: in order of falling cost, each route goes to the process with the least cost so far.

    Args:
        costs (`Sequence[float]`): the cost of every route.
        world_size (`int`): number of processes.

    Returns:
        Per process, the indices of its routes in ascending order. A process may have none.
    """
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, 0, rank) for rank in range(world_size)]
    for route in sorted(range(len(costs)), key=lambda route: -costs[route]):
        # The number of routes decides between equal costs, for example when all masks are on disk.
        load, num_routes, rank = heapq.heappop(loads)
        assigned[rank].append(route)
        heapq.heappush(loads, (load + costs[route], num_routes + 1, rank))
    return [sorted(routes) for routes in assigned]
