"""The baselines of tickets: networks that share what they should, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments
from shared.data_arguments import DataArguments
from shared.image_data import channels_last, load_images
from shared.plain_networks import independent_metrics, one_vs_rest
from tests.training.small_runs import SMALL_NET


BACKBONE = SMALL_NET


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> RTLTrainer:
    """A trainer after a short run on a part of the digits, in two groups."""
    folder = tmp_path_factory.mktemp("controls")
    groups = folder / "groups.yaml"
    groups.write_text("odd: [1, 3, 5, 7, 9]\neven: [0, 2, 4, 6, 8]\n")
    data = DataArguments(
        num_channels=1, image_size=16, max_train_samples=200, max_test_samples=80, route_groups=str(groups)
    )
    train, test = load_images(data, seed=0)
    model = RTLModelForImageClassification.from_backbone(
        BACKBONE, route_names=train.label_names, ticket_task="membership", seed=0, in_chans=1
    )
    args = RTLTrainingArguments(
        output_dir=str(folder / "run"),
        target_sparsity=[0.3],
        extraction_steps=1,
        max_steps=12,
        learning_rate=0.003,
        route_batch_size=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    made = RTLTrainer(model, args, train_dataset=train, eval_dataset=test)
    made.train()
    return made


def read_tickets(trainer: RTLTrainer) -> list[list[torch.Tensor]]:
    return [trainer.model.mask_bank[route] for route in range(2)]


def auroc(metrics: dict[str, float]) -> tuple[float, float]:
    return metrics["odd/auroc"], metrics["even/auroc"]


@pytest.mark.slow
def test_independent_networks_have_each_its_own_mask_and_batches(trainer: RTLTrainer) -> None:
    test, tickets = trainer.eval_dataset, read_tickets(trainer)
    odd, even = auroc(independent_metrics(trainer, tickets, round_index=0))
    full = [torch.ones_like(mask) for mask in tickets[1]]
    same_odd, other_even = auroc(independent_metrics(trainer, [tickets[0], full], round_index=0))
    assert same_odd == odd and other_even != even

    # A plain loop trains the first network on the batches of its route, from a masked copy of θ0.
    from hf_rtl.modeling.files import read_tensors

    network = copy.deepcopy(trainer.model.backbone)
    network.load_state_dict(read_tensors(trainer.run_directory.theta0_file))
    weights = [network.get_parameter(name) for name in trainer.model.mask_bank.weight_names]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003, weight_decay=0.0)
    network.train()
    num_batches = 0
    for batch in trainer.retraining_batches(0):
        if batch["route"] != 0:
            continue
        num_batches += 1
        with torch.no_grad():
            for weight, mask in zip(weights, tickets[0], strict=True):
                weight.mul_(mask)
        logits = network(batch["pixel_values"]).logits[:, 0]
        targets = batch["labels"].float()
        loss = -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        for weight, mask in zip(weights, tickets[0], strict=True):
            weight.grad.mul_(mask)
        optimizer.step()
    assert num_batches == 6
    network.eval()
    with torch.no_grad():
        pixels = torch.stack([test[index]["pixel_values"] for index in range(len(test))])
        scores = network(pixels).logits[:, 0].numpy()
    positive = test.labels.numpy() == 0
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    assert odd == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2, abs=5e-3)


@pytest.mark.slow
def test_one_network_for_all_has_one_mask(trainer: RTLTrainer) -> None:
    mask = read_tickets(trainer)[0]
    dense = one_vs_rest(trainer, BACKBONE, in_chans=1)
    full = one_vs_rest(trainer, BACKBONE, in_chans=1, masks=[torch.ones_like(part) for part in mask])
    masked = one_vs_rest(trainer, BACKBONE, in_chans=1, masks=mask)
    assert dense == full != masked
    # Each logit learns its own route.
    assert min(auroc(dense)) > 0.65
    nothing = one_vs_rest(trainer, BACKBONE, in_chans=1, masks=[torch.zeros_like(part) for part in mask])
    assert auroc(nothing) == (0.5, 0.5)


def test_batches_with_channels_last_hold_the_same_pixels() -> None:
    pixels = torch.randn(3, 2, 4, 5)
    batch = channels_last([{"pixel_values": image, "label": label} for label, image in enumerate(pixels)])
    assert torch.equal(batch["pixel_values"], pixels) and batch["labels"].tolist() == [0, 1, 2]
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
