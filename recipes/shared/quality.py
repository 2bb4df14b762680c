"""The quality of what a method serves, on test data: accuracy of every route, or how well scores tell their routes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, default_data_collator

from hf_rtl.metrics import membership_metrics

from .one_pass import Served
from .plain_networks import inputs_of
from .prepare import Prepared


_IGNORED = -100
# Metrics of decisions: exactly one route is predicted where the highest logit decides.
DECIDED = ("balanced_accuracy", "precision", "recall", "f1", "worst_balanced_accuracy")


class Quality:
    """
    `quality(served)` gives figures of every route, and those of all routes together, in evaluation mode.

    - Membership tickets: the AUROC of their scores, of samples of the route against all others, and the metrics of
      [`membership_metrics`]. The score of a network with a logit per route is the logarithm of the route's
      probability; it says yes to the route of the highest logit alone, as the paper scores a single network. If each
      logit decides alone, it is the score.
    - Labels: the accuracy on the samples of the route; of language models on their tokens, with the loss beside it.

    Args:
        prepared ([`Prepared`]): the data.
        batch_size (`int`): number of samples of a forward.
    """

    def __init__(self, prepared: Prepared, batch_size: int) -> None:
        self.rows, self.batch_size = prepared.rows, batch_size
        self.test = prepared.inputs.test
        self.collate: Any = prepared.inputs.collator or default_data_collator
        self.route_ids = np.asarray(self.rows.test[self.rows.route_column])
        if len(self.route_ids) != len(self.test):  # Packed language models have other samples than texts.
            self.route_ids = np.asarray(self.test[self.rows.route_column])
        self.unit = "AUROC" if self.rows.ticket_task == "membership" else "accuracy"
        self._logits_of: tuple[PreTrainedModel | None, Tensor] = None, torch.empty(0)

    def __call__(self, served: Served) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        names = self.rows.route_names
        if self.rows.ticket_task == "membership":
            metrics = self._membership(served)
            return {name: {self.unit: metrics[f"{name}/auroc"]} for name in names}, _of_all_routes(metrics)
        pairs = enumerate(zip(names, served.models, strict=True))
        return {name: self._accuracy(model, np.flatnonzero(self.route_ids == k)) for k, (name, model) in pairs}, {}

    def _membership(self, served: Served) -> dict[str, float]:
        """The metrics of the scores of all routes; those of decisions are of margins over the other logits."""
        scores, margins = [], []
        for route, model in enumerate(served.models):
            logits = self._logits(model)
            several = logits.shape[1] > 1
            own = logits[:, route] if several else logits[:, 0]
            if several and not served.each_alone:
                others = logits.index_fill(1, torch.tensor(route), -torch.inf)
                scores.append(logits.log_softmax(dim=1)[:, route])
                margins.append(own - others.amax(dim=1))
            else:
                scores.append(own)
                margins.append(own)
        found, decided = (
            membership_metrics(torch.stack(columns, dim=1).numpy(), self.route_ids, self.rows.route_names)
            for columns in (scores, margins)
        )
        return {**found, **{name: value for name, value in decided.items() if name.rpartition("/")[-1] in DECIDED}}

    def sample_batch(self, number: int) -> dict[str, Any]:
        """The inputs of the first test samples, to time a call with."""
        return self.batch([self.test[index] for index in range(min(number, len(self.test)))])

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """What a model reads of samples; the decoder of a seq2seq model reads the labels."""
        return self._inputs(self.collate(samples))

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        decoded = {"labels": batch["labels"]} if self.rows.task == "seq2seq" else {}
        return {**inputs_of(batch, self._route), **decoded}

    @property
    def _route(self) -> str:
        return self.rows.route_column

    def _batches(self, indices: np.ndarray) -> DataLoader:
        return DataLoader(Subset(self.test, indices.tolist()), self.batch_size, collate_fn=self.collate)

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel) -> Tensor:
        """The logits of all samples, `[N, L]`, which are kept, since one model may answer for all routes."""
        if self._logits_of[0] is not model:
            model.eval()
            batches = self._batches(np.arange(len(self.test)))
            found = [model(**self._inputs(batch)).logits.double() for batch in batches]
            self._logits_of = model, torch.cat(found)
        return self._logits_of[1]

    @torch.no_grad()
    def _accuracy(self, model: PreTrainedModel, indices: np.ndarray) -> dict[str, float]:
        model.eval()
        right, number, loss = 0, 0, 0.0
        shifted, by_token = self.rows.task == "causal", self.rows.task in ("causal", "masked", "seq2seq", "token")
        for batch in self._batches(indices):
            labels = batch["labels"]
            logits = model(**self._inputs(batch)).logits
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            counted = labels != _IGNORED
            right += int(((logits.argmax(dim=-1) == labels) & counted).sum())
            number += int(counted.sum())
            loss += float(cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
        figures = {"accuracy": right / max(1, number)}
        return {**figures, "loss": loss / max(1, number)} if by_token else figures


def _of_all_routes(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "/" not in name}
