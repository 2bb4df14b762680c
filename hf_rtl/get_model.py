"""A routed model for a data set: routes, labels and task are read from the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import nn
from transformers import PreTrainedModel

from .data.columns import (
    find_label_column,
    label_column,
    label_values,
    list_columns,
    read_column,
    require_column,
    single_labels,
)
from .data.partition_by import partition_by_column
from .modeling.modeling_rtl import (
    TASK_CLASSES,
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
)


_IMAGE_COLUMNS = ("pixel_values", "image", "img")
_AUDIO_COLUMNS = ("input_values", "input_features", "audio")
_TEXT_COLUMNS = ("input_ids", "text", "sentence")


def get_rtl_model(
    backbone: Any,
    dataset: Any,
    *,
    route_column: str | None = None,
    route_names: Sequence[str] | None = None,
    ticket_task: str | None = None,
    model_class: type[RTLModel] | None = None,
    **options: Any,
) -> RTLModel:
    """
    A routed model whose routes, labels and task are those of a data set. Every choice that is made is printed in a
    line, and can be given instead. [`RTLTrainer`] finds the routes of its data by the same column.

    Args:
        backbone: a timm name, a repo id, a folder, a configuration or a model, as for [`RTLModel.from_backbone`].
        dataset (map-style data set of dicts): the training data.
        route_column (`str`, *optional*): the column with the route of a sample. Defaults to the label column: a route
            per class.
        route_names (`Sequence[str]`, *optional*): the routes. Defaults to the classes of a `ClassLabel` column in
            their order, and to the sorted values of any other.
        ticket_task (`str`, *optional*): defaults to `"membership"` if the label says the route, else to `"labels"`.
        model_class (`type[RTLModel]`, *optional*): the class of the task. Defaults to the classification of images,
            audio, texts or tokens, whichever the columns show.
        **options: the same as for [`RTLModel.from_backbone`]. `num_labels`, and `id2label` if labels have names,
            default to those of the data; `in_chans` of a timm model to the channels of the first `pixel_values`;
            `seed` of weights that are not loaded to 0, so that the same lines continue an interrupted run.

    Raises:
        TypeError, ValueError: the data do not say the route, the labels or the task, or what `from_backbone` refuses.

    Example:
        >>> model = get_rtl_model("resnet18", dataset, route_column="hospital")
        >>> trainer = RTLTrainer(model, args, train_dataset=dataset)
    """
    labels = label_column(dataset)
    column = route_column or find_label_column(dataset, "route_column")
    require_column(dataset, column, "route_column")
    partition = partition_by_column(dataset, column, route_names=route_names)
    _say("routes", f"{len(partition.route_names)}, of column {column!r}: {', '.join(partition.route_names)}")
    if ticket_task is None:
        ticket_task = "membership" if column == labels else "labels"
        why = "the label says the route" if column == labels else "the label is another column than the route"
        _say("ticket_task", f"{ticket_task!r}, since {why}")
    if model_class is None:
        model_class = _class_of_model(backbone) or _class_of_task(dataset, labels)
        _say("model_class", model_class.__name__)
    is_built = isinstance(backbone, nn.Module)
    if ticket_task == "labels" and not is_built and not {"num_labels", "num_classes", "id2label"} & options.keys():
        options.update(_label_options(dataset, labels))
    if model_class is RTLModelForImageClassification and _is_timm_name(backbone) and "in_chans" not in options:
        options.update(_channel_options(dataset))
    if not is_built and "seed" not in options:
        options["seed"] = 0
        _say("seed", "0, of the weights that are not loaded")
    model = model_class.from_backbone(backbone, route_names=partition.route_names, ticket_task=ticket_task, **options)
    model.partition_rule = partition.rule
    return model


def say(text: str) -> None:
    """Prints a text on the first process, unless logging asks for silence."""
    if os.environ.get("RANK", "0") == "0" and logging.getLogger("hf_rtl").isEnabledFor(logging.WARNING):
        print(text)


def _say(name: str, choice: str) -> None:
    say(f"{name:13}{choice}")


def _class_of_model(backbone: Any) -> type[RTLModel] | None:
    """The class for a built model, whose own class says its task."""
    for task_class in reversed(TASK_CLASSES) if isinstance(backbone, PreTrainedModel) else ():
        mapping: Any = task_class.backbone_class._model_mapping
        if type(backbone.config) in mapping:
            classes = mapping[type(backbone.config)]
            if type(backbone) in (classes if isinstance(classes, tuple) else (classes,)):
                return task_class
    return None


def _class_of_task(dataset: Any, labels: str | None) -> type[RTLModel]:
    columns = set(list_columns(dataset))
    if columns & set(_IMAGE_COLUMNS):
        return RTLModelForImageClassification
    if columns & set(_AUDIO_COLUMNS):
        return RTLModelForAudioClassification
    first = np.asarray((label_values(dataset) or [None])[0])
    if labels is not None and columns & set(_TEXT_COLUMNS):
        if first.ndim == 0:
            return RTLModelForSequenceClassification
        if first.dtype.kind in "iu":
            return RTLModelForTokenClassification
    raise ValueError(
        f"the columns {', '.join(map(repr, sorted(columns)))} do not say the task. Name its class, as in "
        "`get_rtl_model(…, model_class=RTLModelForCausalLM)`."
    )


def _label_options(dataset: Any, labels: str | None) -> dict[str, Any]:
    """The number of labels, and their names if they have any; nothing where the data do not say them."""
    values = label_values(dataset)
    if labels is None or not values:
        return {}
    if isinstance(values[0], float):
        _say("num_labels", f"1, since column {labels!r} has numbers that are no classes")
        return {"num_labels": 1}
    if single_labels(dataset) is None:
        flat = np.concatenate([np.ravel(value) for value in values])
        options = {"num_labels": int(flat.max()) + 1} if flat.dtype.kind in "iu" else {}
    else:
        values, names = read_column(dataset, labels)
        if names is None and isinstance(values[0], str):
            names = sorted(set(values))
        if names is not None:
            _say("labels", f"{len(names)}, of column {labels!r}: {', '.join(names)}")
            return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        options = {"num_labels": max(values) + 1}
    for name, number in options.items():
        _say(name, f"{number}, the largest label of column {labels!r} and 1")
    return options


def _is_timm_name(backbone: Any) -> bool:
    return isinstance(backbone, (str, Path)) and timm.is_model(str(backbone).removeprefix("timm/"))


def _channel_options(dataset: Any) -> dict[str, int]:
    """`in_chans` of a timm model if the data have images of another number of channels than 3."""
    pixels = dataset[0].get("pixel_values")
    if pixels is None or np.ndim(pixels) != 3 or np.shape(pixels)[0] == 3:
        return {}
    _say("in_chans", f"{np.shape(pixels)[0]}, the channels of 'pixel_values'")
    return {"in_chans": int(np.shape(pixels)[0])}
