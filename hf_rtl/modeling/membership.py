"""Labels and the loss of membership tickets, each of which answers "is this mine?" with one logit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot


def ticket_labels(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels of one ticket, 0 or 1, `[batch]` or `[batch, 1]`, as floats `[batch, 1]`. `ValueError` for others."""
    if labels.ndim == 1:
        labels = labels.unsqueeze(-1)
    # Values are checked on the CPU only: the check would wait for another device, and break a compiled graph.
    look = labels.is_cpu and not torch.compiler.is_compiling()
    if labels.ndim != 2 or labels.shape[1] != 1 or (look and bool(((labels != 0) & (labels != 1)).any())):
        raise ValueError(
            "`labels` of a membership ticket are 0 or 1 per sample, [batch] or [batch, 1] (1: of the route), "
            f"got {tuple(labels.shape)} with values up to {labels.max().item()}. Home routes are the labels of a "
            "call without `route_ids`."
        )
    return labels.to(dtype)


def one_versus_rest_loss(logits: Tensor, home_routes: Tensor) -> Tensor:
    """
    The mean binary cross-entropy of all tickets (paper, section 4.1).

    Args:
        logits (`Tensor`): `[batch, num_routes]`.
        home_routes (`Tensor`): integers `[batch]`, the route that each sample belongs to.

    Raises:
        ValueError: other `home_routes`.
    """
    num_routes = logits.shape[1]
    if home_routes.ndim != 1 or home_routes.is_floating_point():
        raise ValueError(
            "without `route_ids` the `labels` of membership tickets are home routes, integers [batch], got "
            f"{home_routes.dtype} {tuple(home_routes.shape)}."
        )
    if ((home_routes < 0) | (home_routes >= num_routes)).any():
        raise ValueError(
            "without `route_ids` the `labels` of membership tickets are home routes, allowed are 0 to "
            f"{num_routes - 1}, got {home_routes.tolist()}."
        )
    targets = one_hot(home_routes.long(), num_routes).to(logits.dtype)
    return binary_cross_entropy_with_logits(logits, targets)
