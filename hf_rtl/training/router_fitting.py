"""Fitting routers: on samples whose route is known and that are no test data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import check_scores
from ..modeling.masking import UNION
from ..modeling.mixed_batch import select_samples
from ..modeling.modeling_rtl import RTLModel
from ..modeling.routers import CentroidRouter, EntropyRouter, Router, ScoreRouter, pooled_features


logger = logging.getLogger(__name__)

# Weight of the penalty that keeps scales and offsets finite where the routes can be told apart without an error.
_RIDGE = 1e-3

# Batches of inputs with the route of each sample, `int64 [batch]`.
Batches = Iterable[tuple[Mapping[str, Any], Tensor]]


@torch.no_grad()
def fit_router(
    name: str,
    model: RTLModel,
    training: Batches,
    held_out: Batches,
    *,
    gather: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] = lambda tensors: tensors,
    allow_constant: bool = False,
) -> Router:
    """
    A router for the routes of `model`, on its device.

    Args:
        name (`str`): `"score"`, `"centroid"` or `"entropy"`.
        model ([`RTLModel`]): in evaluation mode.
        training: samples of the training data, for what a router learns: the means of `"centroid"`. Others do not look
            at them.
        held_out: samples that no ticket was trained on, for the scales and offsets: tickets are too sure of samples
            that they know.
        gather (`Callable`, *optional*): brings the samples of all processes together.
        allow_constant (`bool`, defaults to `False`): warn of features and evidence that are the same for all samples,
            as of tickets that pruning has cut through, instead of refusing them. The router is no help then: it names
            the commonest route.

    Raises:
        ValueError: a route without samples, or evidence that is not finite, or, unless allowed, the same for all
            samples.
    """

    def over(batches: Batches, function: Callable[[Mapping[str, Any]], Tensor]) -> tuple[np.ndarray, np.ndarray]:
        pairs = [gather((function(inputs), route_ids)) for inputs, route_ids in batches]
        values, route_ids = (torch.cat(tensors).cpu().numpy() for tensors in zip(*pairs, strict=True))
        return values, route_ids

    def features(inputs: Mapping[str, Any]) -> Tensor:
        with model.route_context(UNION):
            return pooled_features(model.backbone, inputs)

    router: Router
    if name == "centroid":
        values, route_ids = over(training, features)
        directions, bias = nearest_mean(values, route_ids, num_routes=model.num_routes, allow_constant=allow_constant)
        router = CentroidRouter(model.num_routes, directions.shape[1])
        router.directions.copy_(torch.from_numpy(directions))
        router.bias.copy_(torch.from_numpy(bias))
    else:
        router = ScoreRouter(model.num_routes) if name == "score" else EntropyRouter(model.num_routes)
    router.to(model.device)
    values, route_ids = over(held_out, lambda inputs: evidence_of_each(router, model, inputs))
    scale, offset = fit_scale_and_offset(values, route_ids, allow_constant=allow_constant)
    router.scale.copy_(torch.from_numpy(scale))
    router.offset.copy_(torch.from_numpy(offset))
    return router


def evidence_of_each(router: Router, model: RTLModel, inputs: Mapping[str, Any]) -> Tensor:
    """The evidence of every sample by itself, `[batch, num_routes]`, where `"entropy"` gives one for a batch."""
    if not isinstance(router, EntropyRouter):
        return router.evidence(model, inputs)
    batch_size = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
    samples = (select_samples(inputs, position, batch_size) for position in torch.arange(batch_size).split(1))
    return torch.cat([router.evidence(model, sample) for sample in samples])


def nearest_mean(
    features: np.ndarray, route_ids: np.ndarray, *, num_routes: int, allow_constant: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    The linear rule features · directions + bias, by which the greatest of K numbers is that of the route whose mean is
    the nearest, in units of how features differ within a route: Mahalanobis' distance, with the covariance within the
    routes, whose correlations are shrunk after Ledoit and Wolf (2004), since there may be more features than samples.

    Args:
        features (`np.ndarray`): floats `[N, num_features]`.
        route_ids (`np.ndarray`): integers `[N]`.
        num_routes (`int`): K.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: directions `float64 [K, num_features]` and bias `float64 [K]`; minus half the
        squared distances, up to what is the same for all routes of a sample.

    Raises:
        ValueError: a route without samples, features that are not finite, or, unless `allow_constant`, the same for
            all samples.
    """
    from sklearn.covariance import ledoit_wolf

    features = features.astype(np.float64)
    counts = np.bincount(route_ids, minlength=num_routes)
    if not counts.all():
        raise ValueError(f"route {int(counts.argmin())} has no training samples, so it has no mean features.")
    if not np.isfinite(features).all():
        raise ValueError("the features of the union of tickets have NaN or infinite values.")
    if not allow_constant and (features == features[0]).all():
        raise ValueError("the features of the union of tickets are the same for all samples: no router can use them.")
    means = np.stack([features[route_ids == route].mean(axis=0) for route in range(num_routes)])
    within = features - means[route_ids]
    # Features with a large spread must not decide how much the others are shrunk; one without any counts as it is.
    spread = within.std(axis=0)
    spread[spread == 0] = 1
    covariance = ledoit_wolf(within / spread, assume_centered=True)[0] if within.any() else np.eye(len(spread))
    middle = means.mean(axis=0)
    directions = np.linalg.solve(covariance, ((means - middle) / spread).T).T / spread
    return directions, -((means + middle) / 2 * directions).sum(axis=1)


def fit_scale_and_offset(
    evidence: np.ndarray, route_ids: np.ndarray, *, allow_constant: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    The positive scale and the offset of every route with which softmax(scale · evidence + offset) is most likely, but
    for a small penalty on what they differ from: a scale of one over the evidence's standard deviation (a mean over
    the routes), and no offset.

    Args:
        evidence (`np.ndarray`): floats `[N, K]`.
        route_ids (`np.ndarray`): integers `[N]`; every route needs a sample.
        allow_constant (`bool`, defaults to `False`): whether evidence that is the same for all samples, and tells no
            route from another, makes offsets that say how common the routes are, with a warning, instead of an error.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: scales and offsets, `float64 [K]`.

    Raises:
        TypeError: `evidence` is not a float array or `route_ids` not an integer array.
        ValueError: shapes that do not match, values that are NaN or infinite, routes out of range or without a sample,
            or, unless allowed, evidence that is the same for all samples.
    """
    route_ids = check_scores("evidence", evidence, "route_ids", route_ids)
    counts = np.bincount(route_ids, minlength=evidence.shape[1])
    if not counts.all():
        raise ValueError(f"`route_ids` has no sample of route {int(counts.argmin())}, so it cannot be calibrated.")
    values = torch.from_numpy(evidence.astype(np.float64))
    spread = values.std(dim=0, correction=0).mean()
    if (values == values[0]).all():
        if not allow_constant:
            raise ValueError("`evidence` is the same for all samples, so it tells no route from another.")
        logger.warning("the router's evidence is the same for all samples: it will always name the commonest route.")
        spread = torch.ones_like(spread)
    values, targets = values / spread, torch.from_numpy(route_ids)
    log_scale = torch.zeros(values.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros_like(log_scale, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, offset], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(log_scale.exp() * values + offset, targets)
        loss = loss + _RIDGE * (log_scale.square() + offset.square()).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (log_scale.detach().exp() / spread).numpy(), offset.detach().numpy()
