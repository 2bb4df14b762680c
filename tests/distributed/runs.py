"""What the processes of the distributed tests do. Imported once, by the server that they are forked from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from timm.models import create_model  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import ViTConfig  # noqa: E402

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments  # noqa: E402


torch.set_num_threads(1)

ROUTES = ["ant", "bee", "cat"]
_ = create_model  # loads timm's models before the fork


class Images(Dataset):
    """
    Images of 8 x 8 whose colour says the route, with random noise drawn from torch's global generator at every fetch.

    Args:
        number (`int`): of images.
        sizes (`list[int]`, *optional*): images per route, in turn by default.
        noise (`float`): of the augmentation.
        dtype (`torch.dtype`): of the images.
    """

    def __init__(
        self,
        number: int = 24,
        *,
        sizes: list[int] | None = None,
        noise: float = 0.2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        if sizes is None:
            self.labels = [index % 3 for index in range(number)]
        else:
            self.labels = [route for route, size in enumerate(sizes) for _ in range(size)]
        self.images = torch.randn(len(self.labels), 3, 8, 8, generator=generator, dtype=dtype)
        for index, label in enumerate(self.labels):
            self.images[index, label] += 1
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"pixel_values": image + self.noise * torch.randn_like(image), "label": self.labels[index]}


def make_model(kind: str, **options: Any) -> RTLModelForImageClassification:
    """A network with batch norm (`"timm"`) or a transformer (`"vit"`), with three membership routes."""
    backbone: Any = "test_resnet"
    if kind == "vit":
        backbone = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    return RTLModelForImageClassification.from_backbone(
        backbone, route_names=ROUTES, ticket_task="membership", seed=0, **options
    )


def make_trainer(
    folder: str | Path, kind: str = "timm", *, data: Dataset | None = None, model: Any = None, **options: Any
) -> RTLTrainer:
    settings = {
        "target_sparsity": [0.3, 0.6],
        "prune_amount": 0.3,
        "extraction_steps": 2,
        "max_steps": 6,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "route_batch_size": 12,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
    }
    args = RTLTrainingArguments(output_dir=str(folder), **{**settings, **options})
    return RTLTrainer(
        make_model(kind) if model is None else model,
        args,
        train_dataset=Images() if data is None else data,
        eval_dataset=Images(12, noise=0.0),
    )


def summary(trainer: RTLTrainer) -> dict[str, Any]:
    """What a process has in the end, and how many there really were."""
    return {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "rank": trainer.args.process_index,
        "fingerprint": trainer.model.mask_bank.fingerprint(),
        "state": {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()},
        "metrics": trainer.rounds[-1]["metrics"],
    }


def train(folder: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(folder, kind, **options)
    trainer.train()
    return summary(trainer)
