"""`hf-rtl predict`: answers images, audio files and texts with the tickets of a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from transformers import Pipeline

from hf_rtl import RTLConfig, routed_pipeline

from .classifiers import (
    AUDIO,
    IMAGES,
    TASKS,
    TEXTS,
    Kind,
    count_channels,
    find_task,
    load_processor,
    make_inputs,
    one_line_errors,
    score_options,
    score_threshold,
    words_on_cut,
)
from .models import load_config, load_model
from .samples import check_files, read_audio, read_image, read_text
from .tables import fraction, printable, shortened, table, wrapped


_HIGHEST = "highest score"
_LONGEST_WORD = 32  # columns of the table


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    hub = {"revision": args.revision, "token": args.token}
    check_files(args.files)
    config = load_config(args.model, **hub)
    task = find_task(args.model, config)
    kind = TASKS[task]
    _check_route(args, config)
    processor = load_processor(args.model, kind, config, hub)
    read = _reader(kind, processor)
    # Files are read twice: errors come before any work, and what is read need not fit the memory.
    for file in args.files:
        sample = read(file)
        cut = words_on_cut(repr(file), sample, processor) if kind is TEXTS else None
        if cut is not None:
            print(cut, file=sys.stderr)
    model = load_model(args.model, **hub)
    if kind is IMAGES:
        read = partial(read_image, num_channels=count_channels(model))
    classify = routed_pipeline(task, model, **{kind.processor: processor})
    return [answer for file in args.files for answer in _answers(file, read(file), classify, args.route)]


# What can be known before any work


def _check_route(args: argparse.Namespace, config: RTLConfig) -> None:
    """Raises `ValueError` for an unknown route, and for none where neither a router nor scores would say it."""
    names = config.route_names
    listed = ", ".join(map(repr, names))
    if args.route is None and config.router == "given" and config.ticket_task == "labels":
        call = shlex.join(["hf-rtl", "predict", args.model, args.files[0], "--route", names[0]])
        raise ValueError(f"{args.model!r} has no router, so --route must be one of {listed}, as in `{call}`.")
    if args.route is not None and args.route not in names:
        close = get_close_matches(args.route, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown route {args.route!r}; the routes are {listed}.{hint}")


def _reader(kind: Kind, processor: Any) -> Callable[[str], Any]:
    if kind is AUDIO:
        return partial(read_audio, sampling_rate=processor.sampling_rate)
    return read_image if kind is IMAGES else read_text


# Answers


def _answers(file: str, sample: Any, classify: Pipeline, route: str | None) -> list[dict[str, Any]]:
    """What the model says of a file: a single answer, or where it labels tokens one for each entity, if any."""
    model: Any = classify.model
    index, inferred_by, confidence = (None if route is None else model.route_index(route)), None, None
    of_tokens = classify.task == "token-classification"
    options = {"aggregation_strategy": "simple"} if of_tokens else score_options(classify)
    with one_line_errors(model, repr(file)):
        if route is None and model.router is not None:
            decision = model.infer_routes(**make_inputs(sample, classify))
            index, inferred_by, confidence = decision.route_ids.item(), model.router.name, decision.confidence.item()
        found = classify(sample, route_ids=index, **options)
    if index is None:
        # All membership tickets were asked. Each has the name of its route for a label.
        index, inferred_by = model.route_index(found[0]["label"]), _HIGHEST
    about = {"file": file, "route": model.route_name(index), "inferred_by": inferred_by, "confidence": confidence}
    if of_tokens:
        nothing = {**about, "word": None, "answer": None, "score": None}
        return [
            {**about, "word": entity["word"], "answer": entity["entity_group"], "score": float(entity["score"])}
            for entity in found
        ] or [nothing]
    label, score = found[0]["label"], found[0]["score"]
    if model.config.ticket_task == "membership":
        label = "yes" if score > score_threshold(model.config, index) else "no"
    return [{**about, "answer": label, "score": score}]


def text(values: list[dict[str, Any]], args: argparse.Namespace) -> str:
    first = values[0]
    of_tokens, routed = "word" in first, first["confidence"] is not None
    headers = ["file", "route", *(["word"] if of_tokens else []), "answer", "score"]
    rows = []
    for value in values:
        words = [value["route"], *([value["word"]] if of_tokens else []), value["answer"]]
        cells = ["-" if word is None else shortened(printable(word), _LONGEST_WORD) for word in words]
        numbers = [value["score"], *([value["confidence"]] if routed else [])]
        rows.append([printable(value["file"]), *cells, *map(fraction, numbers)])
    answers = table(
        [*headers, *(["confidence"] if routed else [])], rows, keep_start=False, num_words=len(headers) - 1
    )
    return "\n\n".join([answers, *_remark(first)])


def _remark(value: dict[str, Any]) -> list[str]:
    """How the routes were found, if they were not given."""
    if value["inferred_by"] is None:
        return []
    if value["inferred_by"] == _HIGHEST:
        return ["Each route is that of the ticket with the highest score."]
    return [
        wrapped(
            f"Each route was inferred by the router {value['inferred_by']!r}; confidence is the probability of the "
            "likeliest route."
        )
    ]
