"""The models that are pushed, their processors, and the parts of two models that must be equal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)

from hf_rtl import (
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
)
from hf_rtl.modeling.hashing import hash_tensors


ROUTES = ["ant", "bee", "cat"]
WORDS = ["[PAD]", "[UNK]", "a", "small", "red", "bee", "sings", "of", "honey", "and", "rain"]
TEXTS = ["a small bee sings", "rain and honey"]


def make_model(
    kind: str, *, seed: int = 0, ticket_task: str = "membership", route_names: Sequence[str] = ROUTES
) -> RTLModel:
    """
    A network with batch norm (`"timm"`) or a transformer (`"vit"`, `"bert"`, `"gpt2"`), with random masks and
    statistics. `"odd"` is a transformer whose rows of masks do not end at the end of a byte; the tickets of
    `"neurons"` lack whole neurons, and have a down projection of their own.
    """
    routes: dict[str, Any] = {"route_names": route_names, "ticket_task": ticket_task, "seed": seed}
    labels = {"num_labels": 4} if ticket_task == "labels" else {}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        config = BertConfig(**small, vocab_size=len(WORDS), max_position_embeddings=12)
        model = RTLModelForSequenceClassification.from_backbone(config, **routes, **labels)
    elif kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": len(WORDS)}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = GPT2Config(**sizes, **tokens, tie_word_embeddings=False, initializer_range=1.0)
        model = RTLModelForCausalLM.from_backbone(config, **routes)
    else:
        if kind == "odd":
            small.update(hidden_size=18, intermediate_size=25)
        if kind == "neurons":
            routes |= {"private_parameters": ["*.mlp.fc2.weight"], "prune_exclude": ["*.mlp.fc2.weight"]}
        backbone = "test_resnet" if kind == "timm" else ViTConfig(**small, image_size=32, patch_size=8)
        model = RTLModelForImageClassification.from_backbone(backbone, **routes, **labels)
    generator = torch.Generator().manual_seed(seed)
    for route in range(model.num_routes):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < 0.5 for shape in model.mask_bank.shapes]
    # As after training, so that masks and statistics show in the outputs.
    for tensor in [*model.parameters(), *model.norm_statistics.rows]:
        tensor.data += (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    if kind == "neurons":
        remove_neurons(model, generator)
    return model.eval()


def remove_neurons(model: RTLModel, generator: torch.Generator) -> None:
    """Gives the tickets of a ViT masks and private rows without a third of its neurons."""
    (down,) = model.private_parameters.rows
    up = next(index for index, name in enumerate(model.mask_bank.weight_names) if name.endswith("mlp.fc1.weight"))
    for route in range(model.num_routes):
        removed = torch.randperm(down.shape[-1], generator=generator)[: down.shape[-1] // 3]
        masks = [torch.ones(shape, dtype=torch.bool) for shape in model.mask_bank.shapes]
        masks[up][removed] = False
        down.data[route, :, removed] = 0
        model.mask_bank[route] = masks


@torch.no_grad()
def describe(model: RTLModel) -> dict[str, Any]:
    """All that must be equal to the bit after a model has been pushed and loaded."""
    if model.main_input_name == "input_ids":
        inputs = {"input_ids": torch.arange(8).view(2, 4)}
    else:
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    outputs = {name: model(**inputs, route_ids=name).logits for name in model.route_names}
    generated = None
    if model.can_generate():
        generated = model.generate(**inputs, route_ids=model.route_names[:2], max_new_tokens=4).tolist()
    return {
        "class": type(model).__name__,
        "generated": generated,
        "training": model.training,
        "route_names": model.route_names,
        "mask_fingerprint": model.mask_bank.fingerprint(),
        "tensors": {name: hash_tensors({"": tensor}) for name, tensor in _tensors(model).items()},
        "outputs": {name: output.tolist() for name, output in outputs.items()},
    }


def _tensors(model: RTLModel) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 32, "width": 32})


def timm_processor() -> TimmWrapperImageProcessor:
    """The class of `AutoImageProcessor` for timm's repositories. It crops `images()` equally on both sides."""
    config = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.875}
    return TimmWrapperImageProcessor(pretrained_cfg={**config, "interpolation": "bicubic"})


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def log_messages() -> list[str]:
    """A list that collects everything that hf_rtl logs in this process from now on."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_rtl").addHandler(handler)
    return said
