"""Fitted scales and offsets against brute force, the nearest mean against Mahalanobis' formula."""

import math

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from hf_rtl.training.router_fitting import fit_scale_and_offset, nearest_mean


def samples(seed=0, num_samples=400):
    """Evidence for three routes, each scaled and shifted in its own way, and the routes."""
    generator = np.random.default_rng(seed)
    route_ids = generator.choice(3, num_samples, p=[0.5, 0.3, 0.2])
    evidence = generator.normal(size=(num_samples, 3))
    evidence[np.arange(num_samples), route_ids] += 1.5
    return (evidence * [0.2, 1.0, 5.0] + [1.0, -3.0, 0.0]).astype(np.float32), route_ids


def log_loss(evidence, route_ids, scale, offset):
    total = 0.0
    for row, route in zip(evidence.astype(np.float64), route_ids, strict=True):
        scaled = [scale[k] * row[k] + offset[k] for k in range(len(row))]
        total += math.log(sum(math.exp(value) for value in scaled)) - scaled[route]
    return total / len(route_ids)


def penalised(evidence, route_ids, scale, offset):
    spread = np.mean([np.std(column) for column in evidence.astype(np.float64).T])
    log_scale = np.log(np.asarray(scale) * spread)
    return log_loss(evidence, route_ids, scale, offset) + 1e-3 * np.mean(log_scale**2 + np.asarray(offset) ** 2)


def test_no_other_scale_or_offset_is_likelier() -> None:
    evidence, route_ids = samples()
    scale, offset = fit_scale_and_offset(evidence, route_ids)
    assert (scale > 0).all()
    best = penalised(evidence, route_ids, scale, offset)
    for route in range(3):
        for step in (-0.01, 0.01):
            other = scale.copy()
            other[route] *= 1 + step
            assert penalised(evidence, route_ids, other, offset) > best
            moved = offset.copy()
            moved[route] += step
            assert penalised(evidence, route_ids, scale, moved) > best
    # The fit is more likely than no scaling, and than the scales and offsets that made the data.
    truth = log_loss(evidence, route_ids, 1.5 / np.array([0.2, 1.0, 5.0]), [-7.5 + math.log(0.5), 4.5 - 0.2, -0.6])
    assert log_loss(evidence, route_ids, scale, offset) < min(log_loss(evidence, route_ids, [1] * 3, [0] * 3), truth)


def test_routes_that_are_told_apart_without_an_error_give_finite_numbers() -> None:
    route_ids = np.array([0, 1, 2] * 5)
    scale, offset = fit_scale_and_offset(np.eye(3, dtype=np.float32)[route_ids] * 1e-6, route_ids)
    assert np.isfinite(scale).all() and np.isfinite(offset).all()
    assert log_loss(np.eye(3)[route_ids] * 1e-6, route_ids, scale, offset) < 0.2


def test_the_units_of_the_evidence_do_not_matter() -> None:
    evidence, route_ids = samples()
    scale, offset = fit_scale_and_offset(evidence, route_ids)
    tiny_scale, tiny_offset = fit_scale_and_offset(evidence.astype(np.float64) * 2.0**-20, route_ids)
    assert tiny_scale * 2.0**-20 == pytest.approx(scale, rel=1e-6) and tiny_offset == pytest.approx(offset, rel=1e-6)


def grouped_features(seed=1, num_samples=60, num_features=4):
    """Features of which the first differ a little between routes, and the last much between samples."""
    generator = np.random.default_rng(seed)
    route_ids = generator.integers(0, 3, num_samples)
    features = generator.normal(size=(num_samples, num_features)) * [0.1, *[1.0] * (num_features - 2), 30.0] + 7.0
    features[:, 0] += route_ids
    return features.astype(np.float32), route_ids


def test_the_nearest_mean_is_that_of_mahalanobis() -> None:
    features, route_ids = grouped_features()
    directions, bias = nearest_mean(features, route_ids, num_routes=3)
    means = [features[route_ids == route].astype(np.float64).mean(axis=0) for route in range(3)]
    within = np.stack([row - means[route] for row, route in zip(features, route_ids, strict=True)])
    spread = np.sqrt((within**2).mean(axis=0))
    covariance = ledoit_wolf(within / spread, assume_centered=True)[0] * np.outer(spread, spread)
    precision = np.linalg.inv(covariance)
    for row in features.astype(np.float64):
        distances = [(row - mean) @ precision @ (row - mean) for mean in means]
        evidence = directions @ row + bias
        for route in (1, 2):
            expected = -(distances[route] - distances[0]) / 2
            assert evidence[route] - evidence[0] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("num_features", [4, 200])  # fewer and more than samples
def test_differences_within_routes_do_not_hide_those_between(num_features: int) -> None:
    features, route_ids = grouped_features(num_features=num_features, num_samples=90)
    directions, bias = nearest_mean(features, route_ids, num_routes=3)
    others, expected = grouped_features(seed=2, num_features=num_features, num_samples=300)
    found = (others @ directions.T + bias).argmax(axis=1) == expected
    means = np.stack([features[route_ids == route].mean(axis=0) for route in range(3)])
    plain = ((others[:, None] - means) ** 2).sum(axis=2).argmin(axis=1) == expected
    assert found.mean() > plain.mean() + 0.1
    if num_features == 4:
        assert found.mean() > 0.95


def test_routes_without_variance_are_told_apart() -> None:
    features = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    directions, bias = nearest_mean(features, np.array([0, 1, 0, 1]), num_routes=2)
    assert (features @ directions.T + bias).argmax(axis=1).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda evidence, ids: (evidence, np.where(ids == 2, 1, ids)), "no sample of route 2"),
        (lambda evidence, ids: (np.ones_like(evidence), ids), "the same for all samples"),
        (lambda evidence, ids: (np.where(evidence > 1, np.nan, evidence), ids), "nan at"),
        (lambda evidence, ids: (evidence[:5], ids), "`route_ids` has shape"),
        (lambda evidence, ids: (evidence, ids + 1), "goes from 1 to 3"),
    ],
)
def test_bad_evidence_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scale_and_offset(*change(*samples()))


@pytest.mark.parametrize("value", [0.1, 0.5])
def test_evidence_of_dead_tickets_tells_how_common_routes_are(value, caplog) -> None:
    """Constant evidence can be allowed, as in a run with tickets that are cut through; it tells nothing else."""
    ids = np.array([0, 1, 1, 2, 2, 2])
    # The mean of equal numbers may differ from them by rounding, which must not count as variance.
    scale, offset = fit_scale_and_offset(np.full((6, 3), value), ids, allow_constant=True)
    parts = np.exp(value * scale + offset)
    assert parts / parts.sum() == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.01) and scale.max() < 10
    assert "the same for all samples" in caplog.text
    directions, bias = nearest_mean(np.full((6, 2), 0.1), ids, num_routes=3, allow_constant=True)
    assert np.isfinite(directions).all() and np.allclose(directions @ [0.1, 0.1] + bias, 0)


@pytest.mark.parametrize(
    ("features", "ids", "message"),
    [
        (np.ones((3, 2)), [0, 1, 2], "the same for all samples"),
        (np.array([[1.0], [np.inf], [2.0]]), [0, 1, 2], "NaN or infinite"),
        (np.array([[1.0], [3.0], [2.0]]), [0, 2, 2], "route 1 has no training samples"),
    ],
)
def test_bad_features_are_refused(features, ids, message) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_mean(features, np.array(ids), num_routes=3)
