"""A new route for a trained model. Its ticket changes nothing that the other tickets read."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from torch.utils.data import ConcatDataset
from transformers import get_scheduler

from ..data.columns import check_labels, list_columns, single_labels
from ..data.partition import Partition
from ..data.route_data import RouteData
from ..modeling.hashing import hash_tensors
from ..modeling.mask_bank import MaskBank
from ..modeling.masking import UNION
from ..modeling.norm_statistics import tracked_buffers
from ..modeling.private_parameters import norms_biases_and_head
from .evaluation import SINGLE_PREDICTION_CLASSES
from .extraction import scoring_batches, train_and_prune
from .processes import Heartbeat
from .prune_rule import PruneRule
from .randomness import Stream, reproducible
from .recalibration import recalibrate_alone
from .route_trainer import RouteTrainer
from .router_fitting import sample_evidence
from .run_data import RunData, route_data
from .ticket_trainer import TicketTrainer, named_state


@dataclass(frozen=True)
class NewTicket:
    """The ticket of a new route: masks and weights on the CPU, and the network with its private rows."""

    masks: list[Tensor]
    weights: list[Tensor]
    network: nn.Module


def add_route(trainer: RouteTrainer, name: str, dataset: Any, *, calibration_dataset: Any = None) -> dict[str, Any]:
    """See [`RTLTrainer.add_route`]. Trainer and model change only after a ticket has been found."""
    model, run_data = trainer.model, trainer.run_data
    bank = MaskBank(model.config.prunable, [*model.route_names, name])
    if model.norm_statistics is None and any(tracked_buffers(model.backbone)):
        raise ValueError(
            "`add_route` needs `norm_statistics='per_route'`: with shared running statistics, the new route's data "
            "would change the outputs of all tickets."
        )
    schedule = trainer.args.to_dict()["lr_scheduler_type"]
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"`lr_scheduler_type` = {schedule!r} follows evaluations, but a new route is retrained without any; "
            "choose another, for example 'constant'."
        )
    data, held_out = _data_with(trainer, name, dataset, calibration_dataset)
    beating = Heartbeat(trainer.args.process_index, trainer.args.world_size)
    with trainer.explained_failures(), trainer.workers_ended(), beating as heartbeat:
        ticket = _find_ticket(trainer, bank, data, heartbeat)
    if run_data.training is not None:
        run_data.training = data
        run_data.remember(data.dataset, data.partition)
    used = model.mask_bank.union()
    added = [mask & ~old.cpu() for mask, old in zip(ticket.masks, used, strict=True)]
    changed = _append(trainer, name, ticket, added, held_out)
    return {
        "route": name,
        "kept": sum(int(mask.sum()) for mask in ticket.masks),
        "added": sum(int(mask.sum()) for mask in added),
        "changed_decisions": changed,
    }


# Data


def _data_with(
    trainer: RouteTrainer, name: str, dataset: Any, calibration_dataset: Any
) -> tuple[RouteData, RouteData | None]:
    """The training data with the new route, and the new route's samples held out of training."""
    model, args, run_data = trainer.model, trainer.args, trainer.run_data
    membership = model.config.ticket_task == "membership"
    if membership and run_data.training is None:
        raise ValueError(
            "`add_route` needs the trainer's `train_dataset`: a membership ticket learns to tell its own samples "
            "from those of other routes, which come from `train_dataset`."
        )
    alone = Partition(np.zeros(len(dataset), dtype=np.int64), [name])
    if not membership:
        single = isinstance(model, SINGLE_PREDICTION_CLASSES)
        if single and not trainer._has_own_loss(trainer.compute_loss_func):
            check_labels(dataset, model.config.num_labels, model.config.label2id, may_ignore=True)
        alone.check("labels", single_labels(dataset) if single else None)
    _check_calibration(run_data, calibration_dataset, args.calibration_fraction)
    own, held_out = route_data(model, args, dataset, alone), None
    if args.calibration_fraction:
        own, held_out = own.hold_out(args.calibration_fraction, args.seed)
    elif calibration_dataset is not None:
        held_out = copy.copy(own)
        held_out.dataset = calibration_dataset
        held_out.partition = Partition(np.zeros(len(calibration_dataset), dtype=np.int64), [name], True)
    others = None if run_data.training is None else (run_data.training.dataset, run_data.training.partition)
    return _chained(model.route_names, name, others, own), held_out


def _check_calibration(run_data: RunData, calibration_dataset: Any, calibration_fraction: float) -> None:
    if calibration_dataset is not None and (run_data.calibration_dataset is None or calibration_fraction):
        raise ValueError(
            "`calibration_dataset` of a new route needs a trainer with a `calibration_dataset`; this trainer "
            + ("has none." if run_data.calibration_dataset is None else "holds out `calibration_fraction` instead.")
        )


def _chained(route_names: Sequence[str], name: str, others: tuple[Any, Partition] | None, new: RouteData) -> RouteData:
    """The samples of the existing routes, `others`, followed by those of the `new` one."""
    chained = copy.copy(new)
    route_ids, rule = new.partition.route_ids + len(route_names), None
    if others is not None:
        if set(list_columns(new.dataset)) != set(list_columns(others[0])):
            raise ValueError(
                f"the data of the new route {name!r} has the columns {', '.join(list_columns(new.dataset))}, but "
                f"that of the trainer has {', '.join(list_columns(others[0]))}; both need the same."
            )
        chained.dataset = ConcatDataset([others[0], new.dataset])
        route_ids, rule = np.concatenate([others[1].route_ids, route_ids]), others[1].rule
    # The rule of the others does not know the new route: saving the model warns of it and leaves it out.
    chained.partition = Partition(route_ids, [*route_names, name], allow_empty=True, rule=rule)
    return chained


# Search


def _find_ticket(trainer: RouteTrainer, bank: MaskBank, data: RouteData, heartbeat: Heartbeat) -> NewTicket:
    """Finds the ticket of the last route of `bank`: pruned as in a run's extraction, then retrained alone."""
    args, progress, route = trainer.args, trainer.progress, bank.num_routes - 1
    rule = PruneRule.of(trainer.model, args)
    network = _network_of_new_route(trainer)
    theta0 = {name: tensor.detach().clone() for name, tensor in named_state(network)}
    ticket_trainer = trainer.ticket_trainer(theta0, network, frozen=trainer.model.mask_bank.union())
    (kept,) = rule.schedule(args.target_sparsity[-1:])
    sampler = data.sampler((Stream.RETRAINING, 0), routes=[route])
    num_steps = args.max_steps
    if num_steps < 0:
        num_steps = math.ceil(args.num_train_epochs * sampler.num_updates_per_route)
    mask = [torch.ones(shape, dtype=torch.bool) for shape in bank.shapes]
    name = bank.route_names[-1]
    progress.start(len(kept) * trainer.extraction_steps(route, data) + num_steps)
    progress.begin_round("a new route")
    try:
        with reproducible(args.extraction_threads):
            for event, num_kept in enumerate(kept):
                progress.begin_route(name, event + 1, len(kept))
                mask = train_and_prune(
                    ticket_trainer,
                    mask,
                    trainer.extraction_batches(route, event, data),
                    num_kept,
                    rule=rule,
                    scoring_batches=partial(scoring_batches, trainer, route, event, data),
                    route=route,
                    name=name,
                    event=event,
                    on_step=progress.step,
                )
            batches = islice(trainer.endless_batches(data, sampler), num_steps)
            weights = _retrain_alone(trainer, ticket_trainer, mask, batches, num_steps, route)
            recalibrate_alone(trainer, network, data, route)
    finally:
        progress.finish()
    heartbeat.meet()
    state = dict(named_state(network))
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise FloatingPointError("a weight became NaN or infinite; lower `learning_rate`, or check the data.")
    trainer.processes.check_same({"ticket": hash_tensors(state)})
    return NewTicket(mask, weights, network)


def _retrain_alone(
    trainer: RouteTrainer,
    ticket_trainer: TicketTrainer,
    mask: list[Tensor],
    batches: islice[dict[str, Any]],
    num_steps: int,
    route: int,
) -> list[Tensor]:
    args = trainer.args

    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        warmup_steps = args.get_warmup_steps(num_steps)
        return get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps, args.lr_scheduler_kwargs)

    seed = (args.seed, Stream.RETRAINING, route)
    on_step = trainer.progress.step
    return ticket_trainer.train(mask, batches, seed=seed, on_step=on_step, make_scheduler=make_scheduler)


@torch.no_grad()
def _network_of_new_route(trainer: RouteTrainer) -> nn.Module:
    """
    A copy of the backbone without masks, with the private parameters and statistics of the union of all tickets. Only
    prunable weights and the parameters that a new ticket has of its own are trained.
    """
    model, private = trainer.model, trainer.model.private_parameters
    network = copy.deepcopy(model.backbone).to(trainer.args.device)
    for own, parameter, row in zip(private.own(network), private.rows, private.row(UNION), strict=True):
        own.copy_(row)
        own.requires_grad_(parameter.requires_grad)
    if model.norm_statistics is not None:
        for (module, name), rows in zip(tracked_buffers(network), model.norm_statistics.rows, strict=True):
            module.get_buffer(name).copy_(rows[UNION])
    trained = {*_own_names(trainer), *model.mask_bank.weight_names}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)
    return network


def _own_names(trainer: RouteTrainer) -> list[str]:
    """Names of the parameters that a new ticket has of its own."""
    model = trainer.model
    found = norms_biases_and_head(model.backbone, model.mask_bank.weight_names)
    return list(dict.fromkeys([*model.private_parameters.names, *found]))


# Into the model


@torch.no_grad()
def _append(
    trainer: RouteTrainer, name: str, ticket: NewTicket, added: Sequence[Tensor], held_out: RouteData | None
) -> dict[str, float] | None:
    """Adds the ticket to the model, and fits router and threshold again. Returns fractions of changed decisions."""
    model, config, run_data = trainer.model.eval(), trainer.model.config, trainer.run_data
    others = run_data.calibration_dataset
    has_data = others is not None and held_out is not None and run_data.training is not None
    refit = model.router is not None and has_data
    if refit:
        router, threshold = config.router, config.router_threshold
        fallback = UNION if config.router_fallback is None else config.router_fallback
        before, home_routes = _decisions(trainer, others)
        model.set_router(None)
    if others is not None and held_out is not None:
        chained = _chained(model.route_names, name, (others, trainer.eval_partition(others)), held_out)
        run_data.remember(chained.dataset, chained.partition)
        run_data.calibration_dataset = chained.dataset
    for weight, values, mask in zip(model.masker.weights, ticket.weights, added, strict=True):
        weight.copy_(torch.where(mask.to(weight.device), values.to(weight.device), weight))
    network = ticket.network
    model.append_ticket(
        name,
        ticket.masks,
        statistics=[module.get_buffer(buffer) for module, buffer in tracked_buffers(network)],
        private_parameters={own: network.get_parameter(own).detach() for own in _own_names(trainer)},
        brings_weights=True,
    )
    if config.thresholds is not None and held_out is not None:
        config.thresholds = [*config.thresholds[:-1], (trainer.calibrated_thresholds() or [0.0])[-1]]
    if not refit:
        return None
    trainer.fit_router(router, threshold=threshold, fallback=fallback)
    after, _ = _decisions(trainer, others)
    changed = (before != after).double()
    routes = range(model.num_routes - 1)
    return {model.route_names[k]: float(changed[home_routes == k].mean()) for k in routes}


def _decisions(trainer: RouteTrainer, dataset: Any) -> tuple[Tensor, Tensor]:
    """The route that the router chooses for each sample of a data set, and the sample's own route, on the CPU."""
    model, router = trainer.model, trainer.model.router
    assert router is not None
    pairs = [
        trainer.accelerator.gather_for_metrics(
            (model.decide(sample_evidence(router, model, inputs)).route_ids, route_ids)
        )
        for inputs, route_ids in trainer.batches_with_routes(dataset)
    ]
    decisions, home_routes = (torch.cat(tensors).cpu() for tensors in zip(*pairs, strict=True))
    return decisions, home_routes
