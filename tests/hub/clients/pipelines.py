"""The answers of the stock pipelines of transformers with pushed models, and of the models without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, pipeline

from hf_rtl import RTLModel
from tests.hub.clients.models import TEXTS, image_processor, images, timm_processor


@torch.no_grad()
def ask(
    name: str, task: str, *, route: str | None = None, backend: str | None = None, timm: bool = False
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """
    For each of two inputs, the answers of the stock pipeline and of the model without one, both label -> score.

    Args:
        timm: whether timm's transform prepares the images for the model without a pipeline.
    """
    asked = pipeline(task, model=name, **_processor(name, backend))
    model = RTLModel.from_pretrained(name)
    if task == "text-classification":
        inputs, encoded = TEXTS, asked.tokenizer(TEXTS, padding=True, return_tensors="pt")
    elif timm:
        transform = timm_processor().val_transforms
        inputs, encoded = images(), {"pixel_values": torch.stack([transform(image) for image in images()])}
    else:
        inputs, encoded = images(), image_processor()(images(), return_tensors="pt")
    if route is not None:
        processors = {"tokenizer": asked.tokenizer, "image_processor": asked.image_processor}
        asked = pipeline(task, model=asked.model.with_route(route), **processors)
    answers = asked(inputs, top_k=None)
    logits = model(**encoded, route_ids=route).logits
    membership = model.config.ticket_task == "membership"
    labels = [route] if membership and route is not None else list(model.config.id2label.values())
    scores = logits.sigmoid() if membership else logits.softmax(1)
    expected = [dict(zip(labels, row.tolist(), strict=True)) for row in scores]
    said = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    return list(zip(said, expected, strict=True))


def _processor(name: str, backend: str | None) -> dict[str, Any]:
    """The arguments of `pipeline` that replace its own choice of processor."""
    return {} if backend is None else {"image_processor": AutoImageProcessor.from_pretrained(name, backend=backend)}


@torch.no_grad()
def compute_answers(name: str, pixels: Tensor, routes: Sequence[str]) -> list[list[float]]:
    """The logits of a model for each image alone, `[1, channels, height, width]`."""
    model = RTLModel.from_pretrained(name)
    return [model(image, route_ids=route).logits[0].tolist() for image, route in zip(pixels, routes, strict=True)]


def pull_and_ask(name: str, image: str) -> tuple[str, list[dict[str, Any]]]:
    """The masks' hash, and the answer of the stock pipeline for the image in a file."""
    return RTLModel.from_pretrained(name).mask_bank.fingerprint(), pipeline("image-classification", model=name)(image)


def ask_to_generate(name: str, **options: Any) -> str:
    """The text that the stock pipeline generates."""
    ask = pipeline("text-generation", model=name)
    return ask(TEXTS[1], max_new_tokens=4, do_sample=False, **options)[0]["generated_text"]


def ask_one(name: str, task: str) -> dict[str, float]:
    """The answer of the stock pipeline for one input, label -> score."""
    answers = pipeline(task, model=name)(
        TEXTS[1] if task == "text-classification" else Image.new("RGB", (40, 50), "orange"), top_k=None
    )
    return {answer["label"]: answer["score"] for answer in answers}
