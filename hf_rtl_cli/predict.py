"""`hf-rtl predict`: answers images, audio files and texts with the tickets of a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, Pipeline, TimmWrapperConfig
from transformers.utils import has_file

from hf_rtl import RTLConfig, routed_pipeline
from hf_rtl.modeling.image_processing import configured_shape
from hf_rtl.modeling.masking import UNION

from .models import load_config, load_model
from .samples import check_files, read_audio, read_image, read_text
from .tables import fraction, printable, shortened, table, wrapped


class _Kind(NamedTuple):
    """A kind of files, and the processor that makes inputs of a model from them."""

    processor: str  # as `pipeline` calls it
    auto_class: Any
    settings: tuple[str, ...]  # a saved processor has at least one of these files


_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_IMAGES = _Kind("image_processor", AutoImageProcessor, _SETTINGS)
_AUDIO = _Kind("feature_extractor", AutoFeatureExtractor, _SETTINGS)
_TEXTS = _Kind("tokenizer", AutoTokenizer, ("tokenizer_config.json", "tokenizer.json"))

# The class of a model -> its task, as `pipeline` calls it, and the files that it answers.
_TASKS = {
    "RTLModelForImageClassification": ("image-classification", _IMAGES),
    "RTLModelForAudioClassification": ("audio-classification", _AUDIO),
    "RTLModelForSequenceClassification": ("text-classification", _TEXTS),
    "RTLModelForTokenClassification": ("token-classification", _TEXTS),
}
# What other classes do in Python.
_INSTEAD = {
    "RTLModelForCausalLM": "hf_rtl.routed_pipeline('text-generation', {model!r})(text, route_ids={route!r})",
    "RTLModelForSeq2SeqLM": "hf_rtl.RTLModel.from_pretrained({model!r}).generate(input_ids, route_ids={route!r})",
    "RTLModelForMaskedLM": "hf_rtl.routed_pipeline('fill-mask', {model!r})(text, route_ids={route!r})",
}
_OTHERWISE = "hf_rtl.RTLModel.from_pretrained({model!r})(…, route_ids={route!r})"
_HIGHEST = "highest score"
_LONGEST_WORD = 32  # columns of the table


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    hub = {"revision": args.revision, "token": args.token}
    check_files(args.files)
    config = load_config(args.model, **hub)
    task, kind = _find_task(args.model, config)
    _check_route(args, config)
    processor = _load_processor(args.model, kind, config, hub)
    read = _reader(kind, processor)
    # Files are read twice: errors come before any work, and what is read need not fit the memory.
    for file in args.files:
        sample = read(file)
        if kind is _TEXTS:
            _tell_of_cut_text(file, sample, processor)
    model = load_model(args.model, **hub)
    if kind is _IMAGES:
        read = partial(read_image, num_channels=configured_shape(model.backbone)[0])
    classify = routed_pipeline(task, model, **{kind.processor: processor})
    return [answer for file in args.files for answer in _answers(file, read(file), classify, args.route)]


# What can be known before any work


def _find_task(name: str, config: RTLConfig) -> tuple[str, _Kind]:
    class_name = (config.architectures or ["of no known class"])[0]
    if class_name not in _TASKS:
        tasks = ", ".join(task for task, _ in _TASKS.values())
        call = _INSTEAD.get(class_name, _OTHERWISE).format(model=name, route=config.route_names[0])
        raise ValueError(f"{name!r} is {class_name}, and predict is for {tasks}; in Python use `{call}`.")
    return _TASKS[class_name]


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


def _load_processor(name: str, kind: _Kind, config: RTLConfig, hub: Mapping[str, Any]) -> Any:
    """The processor beside the model. A tokenizer cuts texts to what the model can read."""
    if not any(has_file(name, file, **hub) for file in kind.settings):
        made = f"{kind.auto_class.__name__}.from_pretrained('org/backbone')"
        if kind is _IMAGES and isinstance(config.backbone_config, TimmWrapperConfig):
            made = "hf_rtl.image_processor_from_timm(timm.data.resolve_model_data_config(model.backbone.timm_model))"
        save = "save_pretrained" if Path(name).is_dir() else "push_to_hub"
        raise ValueError(
            f"{name!r} has no {kind.processor.replace('_', ' ')}, which makes the model's inputs; save one beside it, "
            f"as by `{made}.{save}({name!r})`."
        )
    processor = kind.auto_class.from_pretrained(name, **hub)
    if kind is _TEXTS:
        # Some configurations of models without a limit say -1.
        limits = (processor.model_max_length, getattr(config.backbone_config, "max_position_embeddings", -1))
        processor.model_max_length = min(limit for limit in limits if limit > 0)
    return processor


def _reader(kind: _Kind, processor: Any) -> Callable[[str], Any]:
    if kind is _AUDIO:
        return partial(read_audio, sampling_rate=processor.sampling_rate)
    return read_image if kind is _IMAGES else read_text


def _tell_of_cut_text(file: str, text: str, tokenizer: Any) -> None:
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if count > tokenizer.model_max_length:
        print(
            f"{file!r} has {count:,} tokens, of which the model reads {tokenizer.model_max_length:,}.",
            file=sys.stderr,
        )


# Answers


def _answers(file: str, sample: Any, classify: Pipeline, route: str | None) -> list[dict[str, Any]]:
    """What the model says of a file: a single answer, or where it labels tokens one for each entity, if any."""
    model: Any = classify.model
    index, inferred_by, confidence = (None if route is None else model.route_index(route)), None, None
    try:
        if route is None and model.router is not None:
            decision = model.infer_routes(**_inputs(sample, classify))
            index, inferred_by, confidence = decision.route_ids.item(), model.router.name, decision.confidence.item()
        found = classify(sample, route_ids=index, **_options(classify))
    except (IndexError, RuntimeError, ValueError) as error:
        # torch's errors have many lines; the first one is the reason.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot answer {file!r}: {reason}") from error
    if index is None:
        # All membership tickets were asked. Each has the name of its route for a label.
        index, inferred_by = model.route_index(found[0]["label"]), _HIGHEST
    about = {"file": file, "route": model.route_name(index), "inferred_by": inferred_by, "confidence": confidence}
    if classify.task == "token-classification":
        nothing = {**about, "word": None, "answer": None, "score": None}
        return [
            {**about, "word": entity["word"], "answer": entity["entity_group"], "score": float(entity["score"])}
            for entity in found
        ] or [nothing]
    label, score = found[0]["label"], found[0]["score"]
    membership = model.config.ticket_task == "membership"
    return [{**about, "answer": _verdict(model.config, index, score) if membership else label, "score": score}]


def _inputs(sample: Any, classify: Any) -> dict[str, Any]:
    """What the pipeline gives to the model."""
    if classify.feature_extractor is not None:
        extractor = classify.feature_extractor
        made = extractor(sample, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    elif classify.image_processor is not None:
        made = classify.image_processor(sample, return_tensors="pt")
    else:
        made = classify.tokenizer(sample, truncation=True, return_tensors="pt")
    dtype = classify.model.dtype
    return {
        name: value.to(classify.device, dtype if value.is_floating_point() else None) for name, value in made.items()
    }


def _options(classify: Pipeline) -> dict[str, Any]:
    if classify.task == "token-classification":
        return {"aggregation_strategy": "simple"}
    # Scores of membership tickets are no shares of a whole, also where all are asked.
    membership = classify.model.config.ticket_task == "membership"
    scale = {"function_to_apply": "sigmoid"} if membership else {}
    return {"top_k": 1, **scale, **({"truncation": True} if classify.task == "text-classification" else {})}


def _verdict(config: RTLConfig, index: int, score: float) -> str:
    """Whether a membership ticket takes the sample for one of its route."""
    threshold = 0.0 if config.thresholds is None or index == UNION else config.thresholds[index]
    return "yes" if score > torch.tensor(threshold).sigmoid() else "no"


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
