"""What the processes of the Hub's tests do. Imported once, by the process that they are forked from."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from timm.models import create_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    ImageClassificationPipeline,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hf_rtl
import hf_rtl.plots
from hf_rtl import (
    Partition,
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    RTLTrainer,
    RTLTrainingArguments,
)
from hf_rtl.modeling.hashing import hash_tensors
from hf_rtl_cli.main import main


torch.set_num_threads(1)
# All these are imported when they are first looked at, which is to be before the fork.
_ = create_model, BertForSequenceClassification, TimmWrapperForImageClassification, ViTForImageClassification
_ = ImageClassificationPipeline, TextClassificationPipeline, hf_rtl.plots, matplotlib.backends.backend_agg

ROUTES = ["ant", "bee", "cat"]
WORDS = ["[PAD]", "[UNK]", "a", "small", "red", "bee", "sings", "of", "honey", "and", "rain"]
TEXTS = ["a small bee sings", "rain and honey"]


def make_model(
    kind: str, *, seed: int = 0, ticket_task: str = "membership", route_names: Sequence[str] = ROUTES
) -> RTLModel:
    """
    A network with batch norm (`"timm"`) or a transformer (`"vit"`, `"bert"`, `"gpt2"`), with random masks and
    statistics.

    Of `"odd"` the rows of masks do not end where a byte ends.
    """
    routes = {"route_names": route_names, "ticket_task": ticket_task, "seed": seed}
    labels = {"num_labels": 4} if ticket_task == "labels" else {}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        config = BertConfig(**small, vocab_size=len(WORDS), max_position_embeddings=12)
        model = RTLModelForSequenceClassification.from_backbone(config, **routes, **labels)
    elif kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": len(WORDS)}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = GPT2Config(**sizes, **tokens, tie_word_embeddings=False, initializer_range=1.0)
        model = RTLModelForCausalLM.from_backbone(config, **routes)
    else:
        if kind == "odd":
            small.update(hidden_size=18, intermediate_size=25)
        backbone = "test_resnet" if kind == "timm" else ViTConfig(**small, image_size=32, patch_size=8)
        model = RTLModelForImageClassification.from_backbone(backbone, **routes, **labels)
    generator = torch.Generator().manual_seed(seed)
    for route in range(model.num_routes):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < 0.5 for shape in model.mask_bank.shapes]
    # As trained, so that what is masked, and whose statistics are used, shows in the outputs.
    for tensor in [*model.parameters(), *model.norm_statistics.rows]:
        tensor.data += (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    return model.eval()


@torch.no_grad()
def describe(model: RTLModel) -> dict[str, Any]:
    """All that is to be the same after a model has been pushed and loaded, to the bit."""
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


def call(method: str, *arguments: Any, **keywords: Any) -> None:
    """A method of the Hub's client."""
    getattr(HfApi(), method)(*arguments, **keywords)


def push(
    name: str,
    kind: str = "vit",
    *,
    seed: int = 0,
    ticket_task: str = "membership",
    route_names: Sequence[str] = ROUTES,
    **options: Any,
) -> dict[str, Any]:
    """What was pushed."""
    model = make_model(kind, seed=seed, ticket_task=ticket_task, route_names=route_names)
    model.push_to_hub(name, **options)
    return describe(model)


def push_after_saving(name: str, **options: Any) -> None:
    model = make_model("vit")
    model.save_pretrained("folder", push_to_hub=True, repo_id=name, processing_class=image_processor(), **options)


def push_own_backbone(name: str) -> list[str]:
    """What was said when a model of ours was pushed with its code."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_rtl").addHandler(handler)
    model = RTLModelForImageClassification.from_backbone(
        "ghostnet_rtl", route_names=ROUTES, ticket_task="membership", seed=0
    )
    model.push_to_hub(name, with_code=True)
    return said


def push_view(name: str) -> None:
    make_model("vit").with_route(0).push_to_hub(name)


def push_subfolder(name: str, folder: str) -> dict[str, Any]:
    """What was pushed, as people do that keep several models in one repository."""
    model = make_model("vit")
    model.save_pretrained("model")
    api = HfApi()
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path="model", path_in_repo=folder)
    return describe(model)


def pull(name: str, loader: str = "RTLModel", **options: Any) -> dict[str, Any]:
    """What came back, when loaded by a class of ours or of transformers."""
    loading = getattr(hf_rtl, loader, None) or getattr(transformers, loader)
    return describe(loading.from_pretrained(name, **options))


def pull_executed(name: str, marker: str, **options: Any) -> tuple[list[dict[str, Any]], bool]:
    """What came back by every way to load, and whether the marker was left by code of the repository."""
    loaders = ("RTLModel", "RTLModelForImageClassification", "AutoModel", "AutoModelForImageClassification")
    loaded = [pull(name, loader, **options) for loader in loaders]
    AutoConfig.from_pretrained(name, **options)
    pipeline("image-classification", model=name, **options)
    dynamic = [module for module in sys.modules if module.startswith("transformers_modules")]
    return loaded, bool(dynamic) or Path(marker).exists()


def pull_impatiently(name: str, **options: Any) -> dict[str, Any]:
    """As `pull`, without waiting before another attempt, by a client that keeps what it gets in small pieces."""
    time.sleep = lambda seconds: None
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
    return pull(name, **options)


def pull_config(name: str) -> tuple[str, dict[str, Any]]:
    config = AutoConfig.from_pretrained(name)
    return type(config).__name__, config.to_dict()


# Pipelines


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 32, "width": 32})


def timm_processor() -> TimmWrapperImageProcessor:
    """As `AutoImageProcessor` gives for timm's repositories. It cuts as much of `images()` on both sides."""
    config = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.875}
    return TimmWrapperImageProcessor(pretrained_cfg={**config, "interpolation": "bicubic"})


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def push_with_processor(
    name: str, kind: str, *, seed: int = 0, ticket_task: str = "membership", **options: Any
) -> dict[str, Any]:
    """What was pushed."""
    processors = {"bert": tokenizer, "gpt2": tokenizer, "vit": image_processor, "timm": timm_processor}
    model = make_model(kind, seed=seed, ticket_task=ticket_task)
    model.push_to_hub(name, processing_class=processors[kind](), **options)
    return describe(model)


@torch.no_grad()
def ask(
    name: str, task: str, *, route: str | None = None, backend: str | None = None, timm: bool = False
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """
    For two inputs, what the stock pipeline says, label -> score, and what the model does without a pipeline.

    Args:
        timm: whether images are prepared by timm's transform then.
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
    """An argument of `pipeline`, where its own choice is not to stand."""
    return {} if backend is None else {"image_processor": AutoImageProcessor.from_pretrained(name, backend=backend)}


@torch.no_grad()
def answers_of(name: str, pixels: Tensor, routes: Sequence[str]) -> list[list[float]]:
    """What a model says of each image, `[1, channels, height, width]`, alone."""
    model = RTLModel.from_pretrained(name)
    return [model(image, route_ids=route).logits[0].tolist() for image, route in zip(pixels, routes, strict=True)]


def pull_and_ask(name: str, image: str) -> tuple[str, list[dict[str, Any]]]:
    """The masks' hash, and what the stock pipeline says of the image in a file."""
    return RTLModel.from_pretrained(name).mask_bank.fingerprint(), pipeline("image-classification", model=name)(image)


def ask_to_generate(name: str, **options: Any) -> str:
    """What the stock pipeline makes of a text."""
    ask = pipeline("text-generation", model=name)
    return ask(TEXTS[1], max_new_tokens=4, do_sample=False, **options)[0]["generated_text"]


def ask_one(name: str, task: str) -> dict[str, float]:
    """What the stock pipeline says of one input, label -> score."""
    answers = pipeline(task, model=name)(
        TEXTS[1] if task == "text-classification" else Image.new("RGB", (40, 50), "orange"), top_k=None
    )
    return {answer["label"]: answer["score"] for answer in answers}


# Training


def make_trainer(*, partition: Partition | None = None, **arguments: Any) -> RTLTrainer:
    """Two rounds of a small network on noise, in the folder `run`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(24, 3, 32, 32, generator=generator)
    samples = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]
    settings = {
        "output_dir": str(Path("run").absolute()),
        "target_sparsity": [0.2, 0.4],
        "prune_amount": 0.3,
        "extraction_steps": 1,
        "max_steps": 2,
        "route_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RTLTrainer(
        make_model("vit"),
        RTLTrainingArguments(**{**settings, **arguments}),
        train_dataset=samples,
        partition=partition,
        processing_class=timm_processor(),
    )


def train(**arguments: Any) -> dict[str, Any]:
    """What a training ended with."""
    trainer = make_trainer(**arguments)
    trainer.train()
    return describe(trainer.model.eval())


def train_then_push(options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """What a training ended with."""
    trainer = make_trainer(**arguments)
    trainer.train()
    trained = describe(trainer.model.eval())
    trainer.push_to_hub(**options)
    return trained


def train_then_push_twice(**arguments: Any) -> tuple[str, dict[str, Any]]:
    """What the first push failed with, and what a training ended with."""
    trainer = make_trainer(**arguments)
    trainer.train()
    try:
        trainer.push_to_hub()
    except (HfHubHTTPError, RuntimeError) as error:
        failure = f"{error} {error.__cause__}"
    trainer.push_to_hub()
    return failure, describe(trainer.model.eval())


def retrain_then_push(**arguments: Any) -> dict[str, Any]:
    """What a training ended with, before its trainer was used for a control."""
    trainer = make_trainer(**arguments)
    trainer.train()
    trained = describe(trainer.model.eval())
    masks = [trainer.model.mask_bank[route] for route in (1, 2, 0)]
    trainer.retrain(masks, like=trainer.rounds[-1]["folder"], name="shuffled")
    trainer.push_to_hub()
    return trained


def push_untrained(**arguments: Any) -> None:
    make_trainer(**arguments).push_to_hub()


# Tickets


def push_tickets(base: str, name: str, *, routes: list[str] | None = None, added: str | None = None, **options: Any):
    """What the author's model is, who pulled `base` and found a ticket for a route `added`."""
    model = RTLModel.from_pretrained(base)
    if added is not None:
        generator = torch.Generator().manual_seed(7)
        masks = [torch.rand(shape, generator=generator) < 0.3 for shape in model.mask_bank.shapes]
        for weight, mask, union in zip(model.masker.weights, masks, model.mask_bank.union(), strict=True):
            weight.data[mask & ~union] = 0.1
        statistics = [rows[0] for rows in model.norm_statistics.rows]
        model.append_ticket(added, masks, statistics=statistics, brings_weights=True)
    model.push_tickets_to_hub(name, routes, **options)
    return describe(model)


def pull_with_tickets(
    base: str, name: str, *arguments: Any, drop: str | None = None, **options: Any
) -> dict[str, Any]:
    """What a user has, who adds tickets to a copy of `base`."""
    model = RTLModel.from_pretrained(base)
    if drop is not None:
        model.drop_route(drop)
    model.load_tickets(name, *arguments, **options)
    return describe(model)


def push_model_and_tickets(base: str, name: str) -> None:
    model = make_model("vit")
    model.push_to_hub(base)
    model.push_tickets_to_hub(name)


def push_compact(name: str, kind: str) -> dict[str, Any]:
    """What is pulled of a compact push of it."""
    model = make_model(kind)
    commit = model.push_to_hub(name, compact=True)
    assert model.config.base["revision"] == commit.oid
    return {key: value for key, value in describe(model).items() if key != "tensors"}


def base_of(name: str) -> dict[str, Any]:
    return RTLModel.from_pretrained(name).config.base


def copy_repo(source: str, name: str, *, drop: str | None = None) -> None:
    model = RTLModel.from_pretrained(source)
    if drop is not None:
        model.drop_route(drop)
    model.push_to_hub(name)


# The command line


def save(folder: str, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    model = make_model("vit", seed=seed)
    model.save_pretrained(folder, **options)
    return describe(model)


def command(*arguments: str) -> str:
    """What `hf-rtl` prints. Raises `RuntimeError` with its error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(list(arguments))
    if status:
        raise RuntimeError(errors.getvalue())
    return output.getvalue()
