"""Models that classify files: the processor that makes their inputs, and what their tickets' scores mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, Pipeline, TimmWrapperConfig
from transformers.utils import has_file

from hf_rtl import RTLConfig
from hf_rtl.modeling.image_processing import configured_shape
from hf_rtl.modeling.masking import UNION


class Kind(NamedTuple):
    """A kind of files, and the processor that makes inputs of a model from them."""

    processor: str  # as `pipeline` calls it
    auto_class: Any
    settings: tuple[str, ...]  # a saved processor has at least one of these files


_SETTINGS = ("preprocessor_config.json", "processor_config.json")
IMAGES = Kind("image_processor", AutoImageProcessor, _SETTINGS)
AUDIO = Kind("feature_extractor", AutoFeatureExtractor, _SETTINGS)
TEXTS = Kind("tokenizer", AutoTokenizer, ("tokenizer_config.json", "tokenizer.json"))

# The task of a model, as `pipeline` calls it -> the files that it answers.
TASKS = {
    "image-classification": IMAGES,
    "audio-classification": AUDIO,
    "text-classification": TEXTS,
    "token-classification": TEXTS,
}
_TASK_OF_CLASS = {
    "RTLModelForImageClassification": "image-classification",
    "RTLModelForAudioClassification": "audio-classification",
    "RTLModelForSequenceClassification": "text-classification",
    "RTLModelForTokenClassification": "token-classification",
}
# What models of other classes do in Python.
_INSTEAD = {
    "RTLModelForCausalLM": "hf_rtl.routed_pipeline('text-generation', {model!r})(text, route_ids={route!r})",
    "RTLModelForSeq2SeqLM": "hf_rtl.RTLModel.from_pretrained({model!r}).generate(input_ids, route_ids={route!r})",
    "RTLModelForMaskedLM": "hf_rtl.routed_pipeline('fill-mask', {model!r})(text, route_ids={route!r})",
}
_OTHERWISE = "hf_rtl.RTLModel.from_pretrained({model!r})(…, route_ids={route!r})"


def find_task(name: str, config: RTLConfig, *, asker: str = "predict", tasks: Sequence[str] = tuple(TASKS)) -> str:
    """
    The task of the model `name`. Raises `ValueError`, with what to call instead, if it is none of `tasks`, which are
    those of `asker`.
    """
    class_name = (config.architectures or ["of no known class"])[0]
    task = _TASK_OF_CLASS.get(class_name)
    if task is not None and task in tasks:
        return task
    known = {"model": name, "route": config.route_names[0]}
    if task is None:
        instead = f"in Python use `{_INSTEAD.get(class_name, _OTHERWISE).format(**known)}`"
    else:
        instead = f"`hf-rtl predict {name} FILE` answers its files"
    raise ValueError(f"{name!r} is {class_name}, and {asker} is for {', '.join(tasks)}; {instead}.")


def load_processor(name: str, kind: Kind, config: RTLConfig, hub: Mapping[str, Any]) -> Any:
    """The processor beside the model. A tokenizer cuts texts to what the model can read."""
    if not any(has_file(name, file, **hub) for file in kind.settings):
        made = f"{kind.auto_class.__name__}.from_pretrained('org/backbone')"
        if kind is IMAGES and isinstance(config.backbone_config, TimmWrapperConfig):
            made = "hf_rtl.image_processor_from_timm(timm.data.resolve_model_data_config(model.backbone.timm_model))"
        save = "save_pretrained" if Path(name).is_dir() else "push_to_hub"
        raise ValueError(
            f"{name!r} has no {kind.processor.replace('_', ' ')}, which makes the model's inputs; save one beside it, "
            f"as by `{made}.{save}({name!r})`."
        )
    processor = kind.auto_class.from_pretrained(name, **hub)
    if kind is TEXTS:
        # Some configurations of models without a limit say -1.
        limits = (processor.model_max_length, getattr(config.backbone_config, "max_position_embeddings", -1))
        processor.model_max_length = min(limit for limit in limits if limit > 0)
    return processor


def count_channels(model: Any) -> int:
    """The number of channels of the images that a model takes."""
    return configured_shape(model.backbone)[0]


def words_on_cut(what: str, text: str, tokenizer: Any) -> str | None:
    """A sentence that says how much of `text` the model reads; `None` if all of it."""
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if count <= tokenizer.model_max_length:
        return None
    return f"{what} has {count:,} tokens, of which the model reads {tokenizer.model_max_length:,}."


def make_inputs(sample: Any, classify: Any) -> dict[str, Any]:
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


def score_options(classify: Pipeline, *, top_k: int = 1) -> dict[str, Any]:
    """Arguments of a call of the pipeline of a whole sample's class."""
    # Scores of membership tickets are no shares of a whole, also where all are asked.
    membership = classify.model.config.ticket_task == "membership"
    scale = {"function_to_apply": "sigmoid"} if membership else {}
    return {"top_k": top_k, **scale, **({"truncation": True} if classify.task == "text-classification" else {})}


@contextlib.contextmanager
def one_line_errors(model: Any, what: str) -> Iterator[None]:
    """Turns errors of a model that cannot answer `what` into a `ValueError` of one line."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        # torch's errors have many lines; the first one is the reason.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot answer {what}: {reason}") from error


def score_threshold(config: RTLConfig, index: int) -> float:
    """The score, 0 to 1, above which a membership ticket takes a sample for one of its route."""
    threshold = 0.0 if config.thresholds is None or index == UNION else config.thresholds[index]
    return torch.tensor(threshold).sigmoid().item()
