"""The quality of plain models on the test data of a route: accuracy, or how well a ticket's score tells its route."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, default_data_collator

from .plain_networks import inputs_of
from .prepare import Prepared


_IGNORED = -100


class Quality:
    """
    `quality(model, route)` gives figures of a plain model on the test samples of a route, in evaluation mode.

    - Membership tickets: the AUROC of their score, of samples of the route against all others. The score of a
      network with a logit per route is the logarithm of the route's probability.
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
        self._scores: tuple[PreTrainedModel | None, np.ndarray] = None, np.empty(0)

    def __call__(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        route = self.rows.route_names.index(name)
        if self.rows.ticket_task == "membership":
            return {"AUROC": float(roc_auc_score(self.route_ids == route, self._score(model, route)))}
        return self._accuracy(model, np.flatnonzero(self.route_ids == route))

    def sample_batch(self, number: int) -> dict[str, Any]:
        """The inputs of the first test samples, to time a call with."""
        return self._inputs(self.collate([self.test[index] for index in range(min(number, len(self.test)))]))

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a model reads; the decoder of a seq2seq model reads the labels."""
        decoded = {"labels": batch["labels"]} if self.rows.task == "seq2seq" else {}
        return {**inputs_of(batch, self._route), **decoded}

    @property
    def _route(self) -> str:
        return self.rows.route_column

    def _batches(self, indices: np.ndarray) -> DataLoader:
        return DataLoader(Subset(self.test, indices.tolist()), self.batch_size, collate_fn=self.collate)

    @torch.no_grad()
    def _score(self, model: PreTrainedModel, route: int) -> np.ndarray:
        """The scores of all samples for a route, `[N]`. Logits are kept, since one model may answer for all routes."""
        if self._scores[0] is not model:
            model.eval()
            batches = self._batches(np.arange(len(self.test)))
            found = [model(**self._inputs(batch)).logits.double() for batch in batches]
            self._scores = model, torch.cat(found).numpy()
        logits = torch.from_numpy(self._scores[1])
        return (logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(dim=1)[:, route]).numpy()

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
