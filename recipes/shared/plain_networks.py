"""Baselines without tickets: networks that are trained on the batches of a finished run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader

from hf_rtl import RTLTrainer
from hf_rtl.data.sampling import ALL_ROUTES
from hf_rtl.metrics import membership_metrics
from hf_rtl.modeling.build_backbone import build_backbone
from hf_rtl.modeling.files import read_tensors
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state


# (network, batch) -> loss
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


def one_vs_rest(
    trainer: RTLTrainer,
    backbone: str,
    *,
    round_index: int = 0,
    masks: Sequence[Tensor] | None = None,
    **options: Any,
) -> dict[str, float]:
    """
    Metrics of one network with a logit per route, trained on the batches of a round. A batch of route k trains logit k
    alone; a batch that tickets compete for trains all. `masks`: one per prunable weight; by default nothing is pruned.
    `options` build the backbone, such as `in_chans`.
    """
    args, names = trainer.args, trainer.model.route_names
    network = build_backbone(
        backbone,
        trainer.model.backbone_class,
        seed=args.seed,
        num_labels=len(names),
        problem_type="multi_label_classification",
        **options,
    )
    return _metrics(trainer, _scores(one_vs_rest_network(trainer, network, masks, round_index=round_index), trainer))


def one_vs_rest_network(
    trainer: RTLTrainer, network: nn.Module, masks: Sequence[Tensor] | None, *, round_index: int
) -> nn.Module:
    """The same network, with a logit per route, trained as [`one_vs_rest`] says."""
    network.to(trainer.args.device)
    theta0 = {name: tensor.detach().cpu().clone() for name, tensor in named_state(network)}

    def loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = network(**inputs_of(batch)).logits
        if batch["route"] == ALL_ROUTES:
            return cross_entropy(logits, batch["labels"])
        logits = logits[:, batch["route"]]
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    plain = _plain_trainer(trainer, network, theta0, loss)
    trainer.progress.start(trainer.plan().retraining_steps)
    trainer.progress.begin_round("one-vs-rest")
    batches = trainer.retraining_batches(round_index)
    plain.train(masks, batches, seed=(trainer.args.seed, 0), on_step=trainer.progress.step)
    trainer.progress.finish()
    return network


def independent_networks(
    trainer: RTLTrainer, tickets: Sequence[Sequence[Tensor]], loss: Loss, *, round_index: int
) -> Iterator[nn.Module]:
    """
    One network per route, with the ticket's masks, trained from θ0 on the batches of the route in a round. All
    networks are yielded in the same module, so each must be used before the next.
    """
    network = copy.deepcopy(trainer.model.backbone)
    theta0 = read_tensors(trainer.run_directory.theta0_file)
    plain = _plain_trainer(trainer, network, theta0, loss)
    trainer.progress.start(trainer.plan().retraining_steps)
    for route, masks in enumerate(tickets):
        trainer.progress.begin_round(f"network of {trainer.model.route_names[route]}")
        batches = (batch for batch in trainer.retraining_batches(round_index) if batch["route"] == route)
        plain.train(masks, batches, seed=(trainer.args.seed, route), on_step=trainer.progress.step)
        yield network
    trainer.progress.finish()


def independent_metrics(
    trainer: RTLTrainer, tickets: Sequence[Sequence[Tensor]], *, round_index: int
) -> dict[str, float]:
    """Metrics of one network per class, as `independent_networks` trains them."""

    def loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = network(**inputs_of(batch)).logits.squeeze(1)
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    networks = independent_networks(trainer, tickets, loss, round_index=round_index)
    scores = [_scores(network, trainer)[:, 0] for network in networks]
    return _metrics(trainer, np.stack(scores, axis=1))


def _plain_trainer(trainer: RTLTrainer, network: nn.Module, theta0: dict[str, Tensor], loss: Loss) -> TicketTrainer:
    names = trainer.model.mask_bank.weight_names
    return TicketTrainer(network, theta0, names, trainer.plain_optimizer, loss, trainer.compute_loss_context_manager)


@torch.no_grad()
def _scores(network: nn.Module, trainer: RTLTrainer) -> np.ndarray:
    """The logits of all samples to evaluate on, `[N, logits]`."""
    network.eval()
    device, scores = trainer.args.device, []
    for batch in DataLoader(trainer.eval_dataset, trainer.args.eval_batch_size, collate_fn=trainer.data_collator):
        inputs = {name: value.to(device) for name, value in inputs_of(batch, trainer.args.route_column).items()}
        scores.append(network(**inputs).logits.float().cpu().numpy())
    return np.concatenate(scores)


def _metrics(trainer: RTLTrainer, scores: np.ndarray) -> dict[str, float]:
    homes = trainer.eval_partition(trainer.eval_dataset).route_ids
    return membership_metrics(scores, homes, trainer.model.route_names)


def inputs_of(batch: Mapping[str, Any], route_column: str | None = None) -> dict[str, Any]:
    """What the network reads of a batch."""
    return {name: value for name, value in batch.items() if name not in ("label", "labels", "route", route_column)}
