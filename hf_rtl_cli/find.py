"""`hf-rtl tickets find`: finds the tickets of a trained model in one pass over data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    TimmWrapperConfig,
)

from hf_rtl import RTLConfig, find_tickets
from hf_rtl.model_card.run_record import write_run

from .models import PROCESSOR_FILES, check_free, check_name, copy_beside, load_model, written_model


_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def find(args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.out)
    check_free(out, force=args.force)
    hub = {"revision": args.revision, "token": args.token}
    model = _trained(args.model, hub)
    data, tokenizer = _prepared(_read(args.data, args.split), args, hub)
    found = find_tickets(
        model,
        data,
        sparsity=args.sparsity,
        route_column=args.route_column,
        granularity=args.granularity,
        criterion=args.criterion,
        round_to=args.round_to,
        refit=args.refit,
        num_batches=args.num_batches,
        batch_size=args.batch_size,
        processing_class=tokenizer,
        seed=args.seed,
    )
    with written_model(out) as staging:
        copy_beside(args.model, staging, PROCESSOR_FILES, **hub)
        found.save_pretrained(staging)
        write_run(staging, found.training_run or {})
    return {
        "folder": str(out),
        "tickets": found.route_names,
        "density": dict(zip(found.route_names, found.mask_bank.density().tolist(), strict=True)),
    }


def _trained(name: str, hub: dict[str, Any]) -> PreTrainedModel:
    """The model as the class that saved it, so that its task is known."""
    check_name(name, revision=hub["revision"])
    config = AutoConfig.from_pretrained(name, **hub)
    if isinstance(config, RTLConfig):
        return load_model(name, **hub)
    fallback = AutoModelForImageClassification if isinstance(config, TimmWrapperConfig) else AutoModel
    saved_as = (config.architectures or [""])[0]
    return getattr(transformers, saved_as, fallback).from_pretrained(name, **hub)


def _read(name: str, split: str) -> Dataset:
    """The split of a file, a folder of files or a Hub data set."""
    file = Path(name)
    if not file.is_file():
        return load_dataset(name, split=split)
    if file.suffix not in _BUILDERS:
        raise ValueError(f"{name!r} must be a {', '.join(_BUILDERS)} file, a folder of such files, or a Hub data set.")
    return load_dataset(_BUILDERS[file.suffix], data_files=str(file), split="train")


def _prepared(data: Dataset, args: argparse.Namespace, hub: dict[str, Any]) -> tuple[Dataset, Any]:
    """The data as the model takes them, made when they are read, and the tokenizer of texts."""
    columns = set(data.column_names)
    if columns & {"input_ids", "pixel_values", "input_values", "input_features"}:
        return data, None
    if args.text_column in columns:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **hub)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        texts = args.text_column
        return _made(data, texts, lambda own: tokenizer(own, truncation=True, max_length=args.max_length)), tokenizer
    if args.image_column in columns:
        processor = AutoImageProcessor.from_pretrained(args.model, **hub)
        return _made(data, args.image_column, lambda own: processor([image.convert("RGB") for image in own])), None
    raise ValueError(
        f"{args.data!r} has the columns {', '.join(map(repr, data.column_names))}; name that of texts with "
        "--text-column, or of images with --image-column."
    )


def _made(data: Dataset, column: str, process: Callable[[list[Any]], Any]) -> Dataset:
    return data.with_transform(lambda samples: dict(process(samples[column])))
