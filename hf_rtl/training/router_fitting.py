"""Fitting of routers, on samples with known routes that are not test data."""

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

# Weight of the penalty that keeps scales and offsets finite when the evidence separates the routes without an error.
_RIDGE = 1e-3

# Batches of inputs, each with the route of every sample, `int64 [batch]`.
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
    Fits a router for the routes of `model`, on the model's device.

    Args:
        name (`str`): `"score"`, `"centroid"` or `"entropy"`.
        model ([`RTLModel`]): in evaluation mode.
        training (`Batches`): samples of the training data, for the means of `"centroid"`. Other routers do not read
            them.
        held_out (`Batches`): samples that no ticket was trained on, for scales and offsets. Tickets are too confident
            on their training samples.
        gather (`Callable`, *optional*): gathers the tensors of all processes.
        allow_constant (`bool`, defaults to `False`): if features or evidence are the same for all samples, for example
            because pruning disconnected the tickets, warn instead of raising. That router always chooses the most
            frequent route.

    Raises:
        ValueError: a route has no samples, or features or evidence are not finite or, unless `allow_constant`, the
            same for all samples.
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
    values, route_ids = over(held_out, lambda inputs: sample_evidence(router, model, inputs))
    scale, offset = fit_scale_and_offset(values, route_ids, allow_constant=allow_constant)
    router.scale.copy_(torch.from_numpy(scale))
    router.offset.copy_(torch.from_numpy(offset))
    return router


def sample_evidence(router: Router, model: RTLModel, inputs: Mapping[str, Any]) -> Tensor:
    """The evidence of each single sample, `[batch, num_routes]`. For a batch, `"entropy"` itself gives one for all."""
    if not isinstance(router, EntropyRouter):
        return router.evidence(model, inputs)
    batch_size = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
    samples = (select_samples(inputs, position, batch_size) for position in torch.arange(batch_size).split(1))
    return torch.cat([router.evidence(model, sample) for sample in samples])


def nearest_mean(
    features: np.ndarray, route_ids: np.ndarray, *, num_routes: int, allow_constant: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    The linear rule that finds the route with the nearest mean: the largest of the K values features · directions +
    bias is that of the nearest route. The distance is Mahalanobis' distance with the covariance within the routes,
    whose correlations are shrunk after Ledoit and Wolf (2004), because there may be more features than samples.

    Args:
        features (`np.ndarray`): floats `[N, num_features]`.
        route_ids (`np.ndarray`): integers `[N]`.
        num_routes (`int`): K.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: directions `float64 [K, num_features]` and bias `float64 [K]`. The K values
        are minus half the squared distances, up to a term that is the same for all routes of a sample.

    Raises:
        ValueError: a route has no samples, or features are not finite or, unless `allow_constant`, the same for all
            samples.
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
    # Features are standardised: one with a large standard deviation must not decide how much the others are shrunk.
    deviation = within.std(axis=0)
    deviation[deviation == 0] = 1
    covariance = ledoit_wolf(within / deviation, assume_centered=True)[0] if within.any() else np.eye(len(deviation))
    middle = means.mean(axis=0)
    directions = np.linalg.solve(covariance, ((means - middle) / deviation).T).T / deviation
    return directions, -((means + middle) / 2 * directions).sum(axis=1)


def fit_scale_and_offset(
    evidence: np.ndarray, route_ids: np.ndarray, *, allow_constant: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    Fits a positive scale and an offset per route, for the highest likelihood of softmax(scale · evidence + offset). A
    small penalty pulls scales to 1 / (standard deviation of the evidence, mean over the routes) and offsets to 0.

    Args:
        evidence (`np.ndarray`): floats `[N, K]`.
        route_ids (`np.ndarray`): integers `[N]`; every route needs a sample.
        allow_constant (`bool`, defaults to `False`): if evidence is the same for all samples, warn instead of raising.
            The offsets then only tell how frequent the routes are.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: scales and offsets, `float64 [K]`.

    Raises:
        TypeError: `evidence` is not a float array or `route_ids` not an integer array.
        ValueError: shapes that do not match, values that are NaN or infinite, routes out of range or without a sample,
            or, unless `allow_constant`, evidence that is the same for all samples.
    """
    route_ids = check_scores("evidence", evidence, "route_ids", route_ids)
    counts = np.bincount(route_ids, minlength=evidence.shape[1])
    if not counts.all():
        raise ValueError(f"`route_ids` has no sample of route {int(counts.argmin())}, so it cannot be calibrated.")
    values = torch.from_numpy(evidence.astype(np.float64))
    deviation = values.std(dim=0, correction=0).mean()
    if (values == values[0]).all():
        if not allow_constant:
            raise ValueError("`evidence` is the same for all samples, so it tells no route from another.")
        logger.warning("the router's evidence is the same for all samples: it always chooses the most frequent route.")
        deviation = torch.ones_like(deviation)
    values, targets = values / deviation, torch.from_numpy(route_ids)
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
    return (log_scale.detach().exp() / deviation).numpy(), offset.detach().numpy()
