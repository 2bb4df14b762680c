"""Controls beside RTL at the same budget: what a table must be compared with before it is believed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForImageClassification

from hf_rtl import RTLModel, RTLTrainer
from hf_rtl.data.sampling import ALL_ROUTES
from hf_rtl.metrics import membership_metrics
from hf_rtl.modeling.build_backbone import build_backbone
from hf_rtl.modeling.files import read_tensors
from hf_rtl.pruning import random_masks, shuffled_masks
from hf_rtl.training.ticket_trainer import TicketTrainer, named_state

from .data_arguments import DataArguments
from .image_data import ImageTensors


# What takes the tickets' place, at their densities.
CONTROL_MASKS = {"random masks": random_masks, "layer-shuffled masks": shuffled_masks}


def controls(
    trainer: RTLTrainer, train: ImageTensors, test: ImageTensors, backbone: str, data: DataArguments
) -> list[dict[str, Any]]:
    """
    Reports with a `method` for every round of a finished run: random masks and layer-shuffled masks of the tickets'
    densities, retrained as the tickets were; the tickets with routes shifted by one, so that each answers for its
    neighbour; and once, a dense one-vs-rest model with a logit per route, trained on the same batches.
    """
    reports = []
    for report in trainer.rounds:
        model = model_of_round(trainer, report)
        reports.append(_shifted(trainer, model, test, report))
        tickets = [model.mask_bank[route] for route in range(model.num_routes)]
        for method in CONTROL_MASKS:
            reports.append({"method": method, **with_other_masks(trainer, report, tickets, method)})
    return [*reports, dense(trainer, test, backbone, data)]


def dense(trainer: RTLTrainer, test: ImageTensors, backbone: str, data: DataArguments) -> dict[str, Any]:
    """The report of a dense one-vs-rest model, trained on the batches of the first round."""
    metrics = one_vs_rest(trainer, test, backbone, data)
    return {"method": "dense one-vs-rest", "sparsity": None, "metrics": metrics}


def model_of_round(trainer: RTLTrainer, report: dict[str, Any]) -> RTLModel:
    return type(trainer.model).from_pretrained(f"{trainer.args.output_dir}/{report['folder']}")


def with_other_masks(
    trainer: RTLTrainer, report: dict[str, Any], tickets: Sequence[Sequence[Tensor]], method: str
) -> dict[str, Any]:
    """The report of a round whose tickets were replaced by those of a method of `CONTROL_MASKS`, and retrained."""
    masks = [
        CONTROL_MASKS[method](mask, generator=torch.Generator().manual_seed(trainer.args.seed * 1000 + route))
        for route, mask in enumerate(tickets)
    ]
    name = f"{method.replace(' ', '-')}-sparsity-{report['sparsity']:g}"
    return trainer.retrain(masks, like=report["folder"], name=name)


def _shifted(trainer: RTLTrainer, model: Any, test: ImageTensors, report: dict[str, Any]) -> dict[str, Any]:
    """Ticket k scores for route k + 1."""
    scores, homes = _scores(trainer, model, test)
    metrics = membership_metrics(np.roll(scores, 1, axis=1), homes, model.route_names)
    return {"method": "routes shifted by one", "sparsity": report["sparsity"], "metrics": metrics}


def _scores(trainer: RTLTrainer, model: Any, test: ImageTensors) -> tuple[np.ndarray, np.ndarray]:
    before, trainer.model = trainer.model, model.to(trainer.args.device)
    try:
        loader = trainer.get_eval_dataloader(test)
        output = trainer.evaluation_loop(loader, description="Scores", prediction_loss_only=False)
    finally:
        trainer.model = before
    return output.predictions, output.label_ids


def one_vs_rest(
    trainer: RTLTrainer,
    test: ImageTensors,
    backbone: str,
    data: DataArguments,
    *,
    round_index: int = 0,
    masks: Sequence[Tensor] | None = None,
) -> dict[str, float]:
    """
    Metrics of one network with a logit per route, trained on the batches of a round: one of route k trains logit k
    alone, and one that tickets compete for all of them. `masks`: one per prunable weight; by default all is kept.
    """
    args, names = trainer.args, trainer.model.route_names
    network = build_backbone(
        backbone,
        AutoModelForImageClassification,
        seed=args.seed,
        num_labels=len(names),
        problem_type="multi_label_classification",
        in_chans=data.num_channels,
    ).to(args.device)
    theta0 = {name: tensor.detach().cpu().clone() for name, tensor in named_state(network)}

    def loss(network: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = network(batch["pixel_values"]).logits
        if batch["route"] == ALL_ROUTES:
            return cross_entropy(logits, batch["labels"])
        logits = logits[:, batch["route"]]
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    plain = _plain_trainer(trainer, network, theta0, loss)
    trainer.progress.start(trainer.plan().retraining_steps)
    trainer.progress.begin_round("one-vs-rest")
    plain.train(masks, trainer.retraining_batches(round_index), seed=(args.seed, 0), on_step=trainer.progress.step)
    trainer.progress.finish()
    return membership_metrics(_plain_scores(network, test, args), test.labels.numpy(), names)


def independent_models(
    trainer: RTLTrainer, test: ImageTensors, tickets: Sequence[Sequence[Tensor]], *, round_index: int
) -> dict[str, float]:
    """
    Metrics of one network per route that shares nothing with the others: each ticket's masks, trained from θ0 on the
    batches that its route has in a round.
    """
    network = copy.deepcopy(trainer.model.backbone)
    theta0 = read_tensors(trainer.run_directory.theta0_file)

    def loss(network: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = network(batch["pixel_values"]).logits.squeeze(1)
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    plain = _plain_trainer(trainer, network, theta0, loss)
    scores = []
    trainer.progress.start(trainer.plan().retraining_steps)
    for route, masks in enumerate(tickets):
        trainer.progress.begin_round(f"model of {trainer.model.route_names[route]}")
        batches = (batch for batch in trainer.retraining_batches(round_index) if batch["route"] == route)
        plain.train(masks, batches, seed=(trainer.args.seed, route), on_step=trainer.progress.step)
        scores.append(_plain_scores(network, test, trainer.args)[:, 0])
    trainer.progress.finish()
    return membership_metrics(np.stack(scores, axis=1), test.labels.numpy(), trainer.model.route_names)


def _plain_trainer(trainer: RTLTrainer, network: torch.nn.Module, theta0: Any, loss: Any) -> TicketTrainer:
    names = trainer.model.mask_bank.weight_names
    return TicketTrainer(network, theta0, names, trainer._plain_optimizer, loss, trainer.compute_loss_context_manager)


@torch.no_grad()
def _plain_scores(network: torch.nn.Module, test: ImageTensors, args: Any) -> np.ndarray:
    network.eval()
    scores = []
    for start in range(0, len(test), args.eval_batch_size):
        samples = test.__getitems__(range(start, min(start + args.eval_batch_size, len(test))))
        pixels = torch.stack([sample["pixel_values"] for sample in samples]).to(args.device)
        scores.append(network(pixels).logits.float().cpu().numpy())
    return np.concatenate(scores)
