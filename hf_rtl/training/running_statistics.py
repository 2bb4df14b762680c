"""Running statistics in training: averaged over processes, and recomputed for the union of all tickets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.modeling_rtl import RTLModel
from ..modeling.norm_statistics import tracked_buffers, tracking_layers


def running_statistics(model: RTLModel, route: int) -> list[Tensor]:
    """Running means and variances of a route (-1 for the union), as views to write in place."""
    if model.norm_statistics is None:
        rows = [module.get_buffer(name) for module, name in tracked_buffers(model.backbone)]
    else:
        rows = [rows[route] for rows in model.norm_statistics.rows]
    return [row for row in rows if row.is_floating_point()]


def prepare_for_ddp(model: RTLModel) -> None:
    """
    Leaves masks and running statistics out of what DDP broadcasts in every step: masks never change in training, and
    statistics are averaged.
    """
    statistics = {id(module.get_buffer(name)) for module, name in tracked_buffers(model.backbone)}
    kept_in_step = [
        name
        for name, buffer in model.named_buffers()
        if id(buffer) in statistics or name.startswith(("mask_bank.", "norm_statistics."))
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, kept_in_step)
    if dist.is_initialized():
        # An evaluation before any training sets this, and accelerate would then train without DDP.
        model._is_accelerate_prepared = False


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
def recalibrate(
    model: RTLModel, batches: Iterable[tuple[int, dict[str, Any]]], autocast: Callable[[], AbstractContextManager]
) -> None:
    """
    Replaces running statistics by their plain averages over batches. Only the layers that keep them compute as in
    training. The model is in evaluation mode afterwards.

    Args:
        model ([`RTLModel`]): statistics of a route without batches stay as they are; those that all routes share are
            averaged over all batches.
        batches: pairs of a route, -1 for the union, and the inputs of samples, without labels, on the device. They are
            read only if a layer keeps running statistics.
        autocast (`Callable`): the context in which the model computes.
    """
    num_batches: Counter[int] = Counter()
    with _norms_in_training(model) as layers:
        for route, inputs in batches if layers else ():
            row = 0 if model.norm_statistics is None else route
            num_batches[row] += 1
            with model.route_context(route):
                _begin_batch(layers, num_batches[row])
                with autocast():
                    model(**inputs)
    for route in num_batches:
        for statistics in running_statistics(model, route):
            statistics.copy_(broadcast(statistics.clone()))  # devices may round differently


@torch.no_grad()
def recalibrate_network(
    network: nn.Module, batches: Iterable[dict[str, Any]], autocast: Callable[[], AbstractContextManager]
) -> None:
    """The same for the network of a single ticket. Every process must do it on the same batches."""
    with _norms_in_training(network) as layers:
        for number, inputs in enumerate(batches if layers else (), start=1):
            _begin_batch(layers, number)
            with autocast():
                network(**inputs)


def _begin_batch(layers: Iterable[Any], number: int) -> None:
    """Makes the moving averages of layers plain ones: `number` counts the batches from 1, which starts anew."""
    for layer in layers:
        layer.momentum = 1 / number
        for module, name in tracked_buffers(layer) if number == 1 else ():
            module.get_buffer(name).fill_(name == "running_var")


@torch.no_grad()
def evaluation_losses(
    model: RTLModel, batches: Iterable[tuple[int, dict[str, Any]]], loss: Callable[[dict[str, Any]], Tensor]
) -> dict[int, tuple[float, float]]:
    """
    Compares the statistics of batches with running statistics, on the same batches and weights.

    Args:
        model ([`RTLModel`]): stays as it is, in evaluation mode.
        batches: pairs of a route and the inputs and labels of its samples, on the device. Read only if a layer keeps
            running statistics.
        loss (`Callable`): the loss of a batch.

    Returns:
        route -> its mean loss with the statistics of the batches, as in training, and with its running statistics.
    """
    sums: dict[int, Tensor] = {}
    num_batches: Counter[int] = Counter()
    with _norms_in_training(model) as layers:
        tracked = list(tracked_buffers(model.backbone))
        for route, inputs in batches if layers else ():
            with model.route_context(route):
                for layer in layers:
                    layer.train()
                kept = [module.get_buffer(name).clone() for module, name in tracked]
                trained = loss(dict(inputs))  # a copy, since many a loss takes the labels out
                for (module, name), before in zip(tracked, kept, strict=True):
                    module.get_buffer(name).copy_(before)
                # In evaluation mode the statistics are not written back, so casts of them are lost.
                for layer in layers:
                    layer.eval()
                evaluated = loss(dict(inputs))
            sums[route] = sums.get(route, 0) + torch.stack([trained.float(), evaluated.float()])
            num_batches[route] += 1
    return {route: tuple((both / num_batches[route]).tolist()) for route, both in sums.items()}


@contextmanager
def _norms_in_training(model: nn.Module) -> Iterator[list[Any]]:
    """Evaluation mode, but for the layers that keep running statistics. Afterwards their momenta are as before."""
    layers = tracking_layers(model)
    momenta = [layer.momentum for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer.train()
        yield layers
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
