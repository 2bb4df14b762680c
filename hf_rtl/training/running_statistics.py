"""Running statistics in training: averaged over processes, and recomputed for the union of all tickets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ..modeling.masking import UNION
from ..modeling.modeling_rtl import RTLModel
from ..modeling.norm_statistics import tracked_buffers


def running_statistics(model: RTLModel, route: int) -> list[Tensor]:
    """Running means and variances of a route (-1 for the union), as views to write in place."""
    if model.norm_statistics is None:
        rows = [module.get_buffer(name) for module, name in tracked_buffers(model.backbone)]
    else:
        rows = [rows[route] for rows in model.norm_statistics.rows]
    return [row for row in rows if row.is_floating_point()]


def average_over_processes(rows: list[Tensor], accelerator: Accelerator) -> None:
    """
    Replaces running statistics by their mean over all processes, after every update. Their recurrence is linear, so
    the result is the recurrence on the mean of the batch statistics of the processes.
    """
    if accelerator.num_processes == 1 or not rows:
        return
    mean = accelerator.reduce(torch.cat([row.reshape(-1).float() for row in rows]), "mean")
    parts = mean.split([row.numel() for row in rows])
    torch._foreach_copy_(rows, [part.view_as(row) for part, row in zip(parts, rows, strict=True)])


@torch.no_grad()
def recalibrate_union(
    model: RTLModel, batches: Iterable[dict[str, Any]], autocast: Callable[[], AbstractContextManager]
) -> None:
    """
    Recomputes the union's row of statistics, as the plain average over batches. Leaves the model in evaluation mode.

    Args:
        model ([`RTLModel`]): a model with statistics per route; other models are not changed.
        batches (`Iterable`): inputs of samples of all routes, without labels, on the device. Read only if needed.
        autocast (`Callable`): makes the context in which the model computes.
    """
    norms = [module for module in model.backbone.modules() if isinstance(module, _NormBase)]
    if model.norm_statistics is None or not norms:
        return
    momenta = [module.momentum for module in norms]
    model.eval()
    try:
        with model.route_context(UNION):
            for module in norms:
                module.reset_running_stats()
                module.train()
                module.momentum = None  # torch then computes a cumulative average
            for inputs in batches:
                with autocast():
                    model(**inputs)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
        model.eval()
    for row in running_statistics(model, UNION):
        row.copy_(broadcast(row.clone()))  # devices may round differently
