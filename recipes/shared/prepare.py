"""From the arguments of a recipe to what a trainer needs: data, a model, a processor and a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from transformers import default_data_collator
from transformers.trainer_utils import EvalPrediction

from hf_rtl import (
    Partition,
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
    partition_by_features,
)
from hf_rtl.modeling.routers import pooled_features
from hf_rtl.training.randomness import seeded

from .arguments import BadInput
from .check_rows import readable, routes_by_labels, warnings_of
from .data_arguments import DataArguments
from .inputs import Inputs, decoder, is_timm_name, make_inputs
from .report import table
from .rows import LABEL, Rows, load_rows


MODEL_CLASSES: dict[str, type[RTLModel]] = {
    "image": RTLModelForImageClassification,
    "audio": RTLModelForAudioClassification,
    "text": RTLModelForSequenceClassification,
    "token": RTLModelForTokenClassification,
    "causal": RTLModelForCausalLM,
    "masked": RTLModelForMaskedLM,
    "seq2seq": RTLModelForSeq2SeqLM,
}
_IGNORED = -100


@dataclass
class Prepared:
    """
    What a run is made of.

    Args:
        rows ([`Rows`]): the samples, their labels and routes.
        inputs ([`Inputs`]): the samples as tensors.
        make_model (`Callable`): makes a model for them, with the same initial weights at every call; other
            `route_names`, `ticket_task` and options may be given.
        said (`list[str]`): what is likely wrong with the data.
    """

    rows: Rows
    inputs: Inputs
    make_model: Callable[..., RTLModel]
    said: list[str]

    @property
    def route_column(self) -> str | None:
        """The column of the routes in the data; `None` if there is one route."""
        return self.rows.route_column if self.rows.route_names else None

    def labelled(self, data: Dataset) -> Dataset:
        """Inputs for one network for all routes, whose labels are the routes if tickets only tell these."""
        if self.rows.ticket_task == "labels" or self.rows.route_column == LABEL:
            return data
        return data.rename_column(self.rows.route_column, LABEL)

    def make_single_model(self) -> RTLModel:
        """A model with one route, for one network for all routes; see `labelled`."""
        names = self.rows.route_names
        named = (
            {}
            if self.rows.ticket_task == "labels"
            else {"id2label": dict(enumerate(names)), "label2id": {name: route for route, name in enumerate(names)}}
        )
        return self.make_model(route_names=["all"], ticket_task="labels", **named)

    def trainer_data(self) -> dict[str, Any]:
        """The arguments of `RTLTrainer` for these data."""
        task, ticket_task = self.rows.task, self.rows.ticket_task
        return {
            "train_dataset": self.inputs.train,
            "eval_dataset": self.inputs.test,
            "processing_class": self.inputs.processor,
            "data_collator": self.inputs.collator,
            # Most audio models of transformers have the loss of exclusive classes alone.
            "compute_loss_func": membership_loss if (task, ticket_task) == ("audio", "membership") else None,
            **self.partition(),
            **self.metrics(),
        }

    def partition(self) -> dict[str, Any]:
        """The partition, if its rule is another than the column of the routes."""
        if self.rows.rule is None:
            return {}
        route_ids = np.asarray(self.rows.train[self.rows.route_column])
        return {"partition": Partition(route_ids, self.rows.route_names, rule=self.rows.rule)}

    def metrics(self) -> dict[str, Any]:
        """A metric beside the loss, for tasks with a prediction per token."""
        if self.rows.task not in ("token", "causal", "masked", "seq2seq"):
            return {}
        names = self.rows.route_names
        route_ids = np.asarray(self.inputs.test[self.rows.route_column])
        return {
            "compute_metrics": partial(
                token_accuracy, route_ids=route_ids, route_names=names, shifted=self.rows.task == "causal"
            ),
            "preprocess_logits_for_metrics": likeliest_tokens,
        }

    def table(self) -> str:
        """The numbers of samples by route and label, and what is likely wrong with them."""
        lines = [table(routes_by_labels(self.rows))] if self.rows.route_names else []
        return "\n".join(lines + [f"note: {sentence}" for sentence in self.said])


def prepare(
    data: DataArguments,
    backbone: str,
    *,
    route_column: str | None,
    seed: int,
    processor: str | None = None,
    **options: Any,
) -> Prepared:
    """
    Reads the data, checks them, and makes the inputs of a backbone.

    Args:
        data ([`DataArguments`]): what is read.
        backbone (`str`): a timm name, a repo id or a folder.
        route_column (`str`, *optional*): the column of the routes; by default the labels are the routes.
        seed (`int`): of weights and samples.
        processor (`str`, *optional*): the repo id or folder of the processor; by default that of the backbone.
        **options: for `from_backbone`.

    Raises:
        BadInput: see [`load_rows`] and [`make_inputs`].
    """
    rows, said = load_rows(data, route_column=route_column, seed=seed), []
    if rows.task in ("image", "audio"):
        rows, said = readable(rows, data, decoder(rows, data))
    inputs = make_inputs(rows, data, processor or backbone)
    if rows.task == "image" and is_timm_name(backbone):
        inputs.options = {"in_chans": data.num_channels or 3}
    model_class = MODEL_CLASSES[rows.task]
    named: dict[str, Any] = {}
    if rows.ticket_task == "labels" and rows.label_names:
        named = {"id2label": dict(enumerate(rows.label_names))}
        named["label2id"] = {name: label for label, name in named["id2label"].items()}
    make_model = partial(model_class.from_backbone, backbone, seed=seed, **inputs.options, **named, **options)
    if data.cluster_routes is not None:
        plain = make_model(route_names=["all"], ticket_task="labels")
        rows, inputs = _with_clusters(rows, inputs, plain, data.cluster_routes, seed)
    if rows.ticket_task == "membership" and rows.route_column != LABEL and LABEL in rows.train.column_names:
        inputs.train, inputs.test = (part.remove_columns(LABEL) for part in (inputs.train, inputs.test))
    make_model = partial(make_model, route_names=rows.route_names, ticket_task=rows.ticket_task)
    return Prepared(rows, inputs, make_model, said + warnings_of(rows))


@contextmanager
def bad_input() -> Iterator[None]:
    """What the library refuses while a run is prepared is input that the recipe cannot use."""
    try:
        yield
    except BadInput:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise BadInput(str(error)) from error


def _with_clusters(rows: Rows, inputs: Inputs, model: RTLModel, num_routes: int, seed: int) -> tuple[Rows, Inputs]:
    """The rows and inputs with the clusters of the backbone's features as routes."""
    if rows.task in ("causal", "masked"):
        # The samples are blocks of several texts.
        train, test = (part.with_format(None) for part in (inputs.train, inputs.test))
        rows = replace(rows, train=train, test=test, input_column="input_ids")
    # Changes of images, and the choice of hidden tokens, are the same whenever the clusters are found.
    with seeded((seed,), torch.device("cpu")):
        torch.manual_seed(seed)
        features = [_features(model, part, inputs) for part in (inputs.train, inputs.test)]
    partition = partition_by_features(features[0], num_routes=num_routes, seed=seed)
    assert partition.rule is not None
    names = partition.route_names
    ids = [partition.route_ids, partition.rule.assign(features[1]).route_ids]
    feature = ClassLabel(names=names)
    rows, inputs = replace(rows, route_names=names, rule=partition.rule), replace(inputs)
    for holder in (rows, inputs):
        for part, of_part in zip(("train", "test"), ids, strict=True):
            column = getattr(holder, part).add_column(rows.route_column, of_part.tolist(), feature=feature)
            setattr(holder, part, column)
    return rows, inputs


@torch.no_grad()
def _features(model: RTLModel, data: Any, inputs: Inputs) -> Tensor:
    """What the backbone makes of each sample before its head, scaled to unit length."""
    collate = inputs.collator or default_data_collator
    model.eval()
    found = []
    for batch in DataLoader(data, batch_size=64, collate_fn=collate):
        given = {name: value for name, value in batch.items() if name not in ("label", "labels")}
        found.append(torch.nn.functional.normalize(pooled_features(model.backbone, given)))
    return torch.cat(found)


def membership_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of a membership ticket: the mean over samples of the binary cross-entropy."""
    number = len(labels) if num_items_in_batch is None else num_items_in_batch
    return binary_cross_entropy_with_logits(outputs.logits, labels, reduction="sum") / number


def likeliest_tokens(logits: Any, labels: Tensor) -> Tensor:
    """The likeliest token of every position, `int64 [batch, positions]`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def token_accuracy(
    prediction: EvalPrediction, *, route_ids: np.ndarray, route_names: list[str], shifted: bool
) -> dict[str, float]:
    """
    The share of tokens that are predicted, of all, of every route, and the mean and the least of these.

    Args:
        prediction (`EvalPrediction`): predicted and right tokens, `[N, positions]`; those of -100 do not count.
        route_ids (`np.ndarray`): the route of each sample, `[N]`.
        route_names (`list[str]`): names of the routes.
        shifted (`bool`): whether position t predicts the token of position t + 1.
    """
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if shifted:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    counted = labels != _IGNORED
    right = ((predicted == labels) & counted).sum(axis=1)
    numbers = counted.sum(axis=1)
    of_routes = {
        name: float(right[route_ids == route].sum() / max(1, numbers[route_ids == route].sum()))
        for route, name in enumerate(route_names)
        if (route_ids == route).any()
    }
    return {
        **{f"{name}/accuracy": value for name, value in of_routes.items()},
        "accuracy": float(right.sum() / max(1, numbers.sum())),
        "mean_route_accuracy": float(np.mean(list(of_routes.values()))),
        "worst_route_accuracy": min(of_routes.values()),
    }
