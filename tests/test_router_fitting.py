"""Fitted scales and offsets against scikit-learn and brute force, means against loops."""

import math

import numpy as np
import pytest

from hf_rtl.router_fitting import fit_scale_and_offset, route_means


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
    # And it is of use: nearly as likely as with the scales and offsets that the data were made with.
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


def test_means_are_those_of_loops() -> None:
    generator = np.random.default_rng(1)
    features, route_ids = generator.normal(size=(20, 4)).astype(np.float32), np.array([0, 1, 2, 1] * 5)
    means = route_means(features, route_ids, num_routes=3)
    for route in range(3):
        rows = [features[index] for index in range(20) if route_ids[index] == route]
        for column in range(4):
            assert means[route, column] == pytest.approx(math.fsum(row[column] for row in rows) / len(rows), rel=1e-12)


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
        route_means(features, np.array(ids), num_routes=3)
