"""Controls beside RTL at the same budget: what a table must be compared with before it is believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from data_arguments import DataArguments
from image_data import ImageTensors
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForImageClassification

from hf_rtl import RTLTrainer
from hf_rtl.backbone import build_backbone
from hf_rtl.metrics import membership_metrics
from hf_rtl.pruning import random_masks, shuffled_masks
from hf_rtl.sampling import ALL_ROUTES
from hf_rtl.ticket_trainer import TicketTrainer, named_state


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
        model = type(trainer.model).from_pretrained(f"{trainer.args.output_dir}/{report['folder']}")
        tickets = [model.mask_bank[route] for route in range(model.num_routes)]
        reports.append(_shifted(trainer, model, test, report))
        for method, make in (("random masks", random_masks), ("layer-shuffled masks", shuffled_masks)):
            masks = [
                make(mask, generator=torch.Generator().manual_seed(trainer.args.seed * 1000 + route))
                for route, mask in enumerate(tickets)
            ]
            name = f"{method.replace(' ', '-')}-sparsity-{report['sparsity']:g}"
            control = trainer.retrain(masks, like=report["folder"], name=name)
            reports.append({"method": method, **control})
    reports.append(_dense(trainer, test, backbone, data))
    return reports


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


def _dense(trainer: RTLTrainer, test: ImageTensors, backbone: str, data: DataArguments) -> dict[str, Any]:
    """
    Unpruned, one logit per route, on the batches of the first round; a batch of route k trains logit k alone, and one
    that tickets compete for all of them.
    """
    args = trainer.args
    names = trainer.model.route_names
    network = build_backbone(
        backbone,
        AutoModelForImageClassification,
        seed=args.seed,
        num_labels=len(names),
        problem_type="multi_label_classification",
        in_chans=data.num_channels,
    ).to(args.device)
    theta0 = {name: tensor.detach().cpu().clone() for name, tensor in named_state(network)}

    def loss(network: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        logits = network(batch["pixel_values"]).logits
        if batch["route"] == ALL_ROUTES:
            return cross_entropy(logits, batch["labels"])
        logits = logits[:, batch["route"]]
        return binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    dense = TicketTrainer(network, theta0, [], trainer._plain_optimizer, loss, trainer.compute_loss_context_manager)
    trainer.progress.start(trainer.plan().retraining_steps)
    trainer.progress.begin_round("dense one-vs-rest")
    dense.train(None, trainer.retraining_batches(0), seed=(args.seed, 0), on_step=trainer.progress.step)
    trainer.progress.finish()
    scores = _dense_scores(network, test, args)
    return {
        "method": "dense one-vs-rest",
        "sparsity": None,
        "metrics": membership_metrics(scores, test.labels.numpy(), names),
    }


@torch.no_grad()
def _dense_scores(network: torch.nn.Module, test: ImageTensors, args: Any) -> np.ndarray:
    network.eval()
    scores = []
    for start in range(0, len(test), args.eval_batch_size):
        samples = test.__getitems__(range(start, min(start + args.eval_batch_size, len(test))))
        pixels = torch.stack([sample["pixel_values"] for sample in samples]).to(args.device)
        scores.append(network(pixels).logits.float().cpu().numpy())
    return np.concatenate(scores)
