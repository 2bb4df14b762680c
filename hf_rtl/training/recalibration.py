"""The running statistics of tickets after joint retraining: taken anew, and compared with what training saw."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..data.route_data import EvaluationData, RouteData
from ..modeling.masking import UNION
from .randomness import Stream, seeded
from .running_statistics import evaluation_losses, recalibrate, recalibrate_network


logger = logging.getLogger(__name__)

# Batches of a route on which training and evaluation are compared.
_NUM_COMPARED = 2


def recalibrate_tickets(trainer: Any, round_index: int) -> None:
    """
    Takes the running statistics of every ticket, and of the union of all tickets, anew from training samples.

    During joint retraining the statistics of a ticket lag behind, because its weights move in the steps of other
    routes too. After `competing_epochs` they stay as they are, because the weights were trained with them.

    Args:
        trainer ([`RouteTrainer`]): its model changes.
        round_index (`int`): the index of the round, part of the key of the batches.
    """
    # Training data may have random transforms; the seed makes them the same after any interruption.
    with seeded((trainer.args.seed, Stream.RECALIBRATION, round_index), trainer.args.device):
        recalibrate(trainer.model, _batches(trainer, round_index), trainer.compute_loss_context_manager)


def recalibrate_alone(trainer: Any, network: nn.Module, data: RouteData, route: int) -> None:
    """The same for a ticket that was trained alone in `network`, on samples of its route in `data`."""
    with seeded((trainer.args.seed, Stream.RECALIBRATION, route), trainer.args.device):
        batches = _batches_of_route(trainer, data, route, (Stream.RECALIBRATION, 0))
        recalibrate_network(network, batches, trainer.compute_loss_context_manager)


def _batches(trainer: Any, round_index: int) -> Iterator[tuple[int, dict[str, Any]]]:
    args, model = trainer.args, trainer.model
    data, key = trainer.run_data.require_training(), (Stream.RECALIBRATION, round_index)
    if not args.competing_epochs:
        for route in range(model.num_routes):
            for inputs in _batches_of_route(trainer, data, route, key):
                yield route, inputs
    if model.norm_statistics is None:
        return
    # No step trains the union, so its statistics are taken in any case.
    num_batches = args.recalibration_batches or type(args).recalibration_batches
    order = np.random.default_rng([data.seed, *key]).permutation(len(data.dataset))
    order = order[: num_batches * data.batch_size]
    samples = EvaluationData(data.dataset, data.partition, membership=data.membership)
    drop_last = len(order) > data.batch_size
    rows = Subset(samples, order.tolist())
    for batch in DataLoader(rows, batch_size=data.batch_size, collate_fn=trainer.collate(), drop_last=drop_last):
        yield UNION, _without_labels(trainer, batch)


def _batches_of_route(trainer: Any, data: RouteData, route: int, key: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    sampler = data.sampler(key, routes=[route])
    num_batches = min(trainer.args.recalibration_batches, sampler.num_updates_per_route)
    for batch in islice(data.endless_batches(sampler, trainer.collate()), num_batches):
        yield _without_labels(trainer, batch)


def _without_labels(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch on the device, without labels and routes."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "route_ids", "route")}
    return trainer._prepare_inputs(inputs)


def warn_of_lagging_statistics(trainer: Any, round_index: int) -> None:
    """Logs a warning that names the tickets whose loss is much worse in evaluation than in training."""
    args, model = trainer.args, trainer.model
    if args.competing_epochs:
        return  # These weights were trained with running statistics.
    key = (Stream.RECALIBRATION, round_index)
    data = trainer.run_data.require_training()
    batches = (
        (route, trainer.ticket_inputs(batch))
        for route in range(model.num_routes)
        for batch in islice(data.endless_batches(data.sampler(key, routes=[route]), trainer.collate()), _NUM_COMPARED)
    )

    def loss(inputs: dict[str, Any]) -> Tensor:
        num_items = trainer._get_num_items_in_batch([inputs], args.device)
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, num_items_in_batch=num_items)

    lagging = [
        f"{model.route_names[route]!r} ({trained:.3g} against {evaluated:.3g})"
        for route, (trained, evaluated) in evaluation_losses(model, batches, loss).items()
        if evaluated - trained > abs(trained) + 0.1  # losses may be negative
    ]
    if lagging and trainer.processes.rank == 0:
        logger.warning(
            f"training and evaluation contradict each other on the same training data. The loss with the statistics "
            f"of a batch, as in training, against that with running statistics, as in evaluation: "
            f"{', '.join(lagging)}. The normalisation layers' running statistics do not fit the weights; raise "
            f"`recalibration_batches` (now {args.recalibration_batches}) or `route_batch_size` (now "
            f"{args.route_batch_size})."
        )
