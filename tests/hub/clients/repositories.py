"""Models that are pushed and pulled."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import HfApi
from transformers import AutoConfig, pipeline

import hf_rtl
from hf_rtl import RTLModel, RTLModelForImageClassification
from tests.hub.clients.models import (
    ROUTES,
    describe,
    image_processor,
    log_messages,
    make_model,
    timm_processor,
    tokenizer,
)


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


def push_with_processor(
    name: str, kind: str, *, seed: int = 0, ticket_task: str = "membership", **options: Any
) -> dict[str, Any]:
    """What was pushed."""
    processors = {"bert": tokenizer, "gpt2": tokenizer, "vit": image_processor, "timm": timm_processor}
    model = make_model(kind, seed=seed, ticket_task=ticket_task)
    model.push_to_hub(name, processing_class=processors[kind](), **options)
    return describe(model)


def push_own_backbone(name: str) -> list[str]:
    """The log messages of pushing, with its code, a model whose backbone is ours."""
    said = log_messages()
    model = RTLModelForImageClassification.from_backbone(
        "ghostnet_rtl", route_names=ROUTES, ticket_task="membership", seed=0
    )
    model.push_to_hub(name, with_code=True)
    return said


def push_view(name: str) -> None:
    make_model("vit").with_route(0).push_to_hub(name)


def push_subfolder(name: str, folder: str) -> dict[str, Any]:
    """Pushes a model into a folder of a repository, as for several models in one. Returns what was pushed."""
    model = make_model("vit")
    model.save_pretrained("model")
    api = HfApi()
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path="model", path_in_repo=folder)
    return describe(model)


def pull(name: str, loader: str = "RTLModel", **options: Any) -> dict[str, Any]:
    """What was loaded by a class of hf_rtl or of transformers."""
    loading = getattr(hf_rtl, loader, None) or getattr(transformers, loader)
    return describe(loading.from_pretrained(name, **options))


def pull_executed(name: str, marker: str, **options: Any) -> tuple[list[dict[str, Any]], bool]:
    """What was loaded in every way, and whether code of the repository has left the marker."""
    loaders = ("RTLModel", "RTLModelForImageClassification", "AutoModel", "AutoModelForImageClassification")
    loaded = [pull(name, loader, **options) for loader in loaders]
    AutoConfig.from_pretrained(name, **options)
    pipeline("image-classification", model=name, **options)
    dynamic = [module for module in sys.modules if module.startswith("transformers_modules")]
    return loaded, bool(dynamic) or Path(marker).exists()


def pull_impatiently(name: str, **options: Any) -> dict[str, Any]:
    """As `pull`, without waiting between attempts, by a client that stores what it receives in small pieces."""
    time.sleep = lambda seconds: None
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
    return pull(name, **options)


def pull_config(name: str) -> tuple[str, dict[str, Any]]:
    config = AutoConfig.from_pretrained(name)
    return type(config).__name__, config.to_dict()


def base_fingerprint(name: str) -> dict[str, Any]:
    return RTLModel.from_pretrained(name).config.base


def copy_repo(source: str, name: str, *, drop: str | None = None) -> None:
    model = RTLModel.from_pretrained(source)
    if drop is not None:
        model.drop_route(drop)
    model.push_to_hub(name)
