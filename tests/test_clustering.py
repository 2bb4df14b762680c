"""Partitions that clustering finds, on points whose clusters are known."""

import itertools
import logging
import math
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from hf_rtl import clustering
from hf_rtl.clustering import group_class_names, partition_by_class_names, partition_by_features
from hf_rtl.data.rules import ByGroups, load_rule, save_rule
from tests.data.small_data import DictDataset, hf_dataset, nearest


SIZES = [40, 25, 30]


def blobs(sizes=SIZES, *, num_features=6, spread=0.3, seed=0):
    """Points around corners that are 10 apart, shuffled, with the corner of each."""
    generator = np.random.default_rng(seed)
    corner = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = 10 * np.eye(len(sizes), num_features)[corner] + spread * generator.normal(size=(sum(sizes), num_features))
    return points.astype(np.float32), corner


def means(points, routes):
    """The mean of each route's points, by explicit loops."""
    points = points.astype(np.float64).tolist()
    return np.array(
        [
            [
                math.fsum(point[column] for point, other in zip(points, routes, strict=True) if other == route)
                / list(routes).count(route)
                for column in range(len(points[0]))
            ]
            for route in range(max(routes) + 1)
        ]
    )


@pytest.mark.parametrize("options", [{"num_routes": 3}, {"min_cluster_size": 5}])
def test_separate_clusters_are_found_the_largest_first(options):
    points, corner = blobs()
    expected = [{0: 0, 1: 2, 2: 1}[index] for index in corner.tolist()]
    partition = partition_by_features(points, **options)
    assert partition.route_ids.tolist() == expected
    assert partition.route_names == ["cluster-0", "cluster-1", "cluster-2"]
    assert partition.counts.tolist() == [40, 30, 25]
    assert not partition.allow_empty
    np.testing.assert_allclose(partition.rule.centres.numpy(), means(points, expected), rtol=1e-6, atol=1e-6)
    assert partition_by_features(torch.from_numpy(points), **options).route_ids.tolist() == expected


def test_k_means_ends_where_centres_are_the_means_of_what_is_nearest():
    points, _ = blobs([60, 60], spread=8.0)  # a single cloud, so that only k-means decides the split
    partition = partition_by_features(points, num_routes=4)
    routes = partition.route_ids.tolist()
    np.testing.assert_allclose(partition.rule.centres.numpy(), means(points, routes), rtol=1e-9)
    assert routes == nearest(points, partition.rule.centres)
    assert sorted(partition.counts, reverse=True) == partition.counts.tolist()


def test_noise_goes_to_the_nearest_centre_and_moves_none(caplog):
    points, _ = blobs()
    noise = np.array([[40, 0, 0, 0, 0, 9], [0, 30, 5, 0, -25, 0], [-20, 0, 3, 0, 0, 30]], dtype=np.float32)
    with caplog.at_level(logging.INFO, logger="hf_rtl"):
        partition = partition_by_features(np.concatenate([points, noise]), min_cluster_size=5)
    routes = partition.route_ids.tolist()
    centres = means(points, routes[: len(points)])
    np.testing.assert_allclose(partition.rule.centres.numpy(), centres, rtol=1e-6, atol=1e-6)
    assert routes[-3:] == nearest(noise, centres)
    assert [record.getMessage() for record in caplog.records] == [
        "HDBSCAN finds 3 clusters and leaves 3 of 98 samples out; 0 others are nearer to another centre."
    ]


def test_training_samples_are_assigned_as_new_ones_are():
    # The centre of a small cluster is nearer to the end of a long cluster than the long one's centre.
    long = np.stack([np.linspace(0, 30, 121), np.zeros(121)], axis=1)
    small = np.array([[30.0, 3.0]]) + 0.1 * np.random.default_rng(0).normal(size=(30, 2))
    points = np.concatenate([long, small])
    partition = partition_by_features(points, min_cluster_size=10)
    routes = partition.route_ids.tolist()
    assert routes == nearest(points, partition.rule.centres)
    assert routes[0] == 0 and routes[120] == 1 == routes[121]


@pytest.mark.parametrize("options", [{"num_routes": 4}, {"min_cluster_size": 5}])
def test_clusters_are_the_same_on_any_number_of_threads_and_when_loaded(options, tmp_path):
    points, _ = blobs([300, 200, 200, 100], num_features=40, spread=1.5)
    partition = partition_by_features(points, seed=3, **options)
    for threads in (1, 2):
        with threadpool_limits(limits=threads):
            again = partition_by_features(points, seed=3, **options)
        assert torch.equal(again.rule.centres, partition.rule.centres)
    save_rule(tmp_path, partition.rule)
    new = np.random.default_rng(1).normal(size=(100, 40)).astype(np.float32)
    for data in (points, new):
        assert load_rule(tmp_path).assign(data).route_ids.tolist() == partition.rule.assign(data).route_ids.tolist()
    assert partition.rule.assign(points).route_ids.tolist() == partition.route_ids.tolist()


def test_the_seed_is_that_of_k_means():
    points, _ = blobs([200], spread=3.0)
    first, second, third = (partition_by_features(points, num_routes=7, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.rule.centres, second.rule.centres)
    assert not torch.equal(first.rule.centres, third.rule.centres)


def test_tiny_clusters_are_warned_of(caplog):
    partition_by_features(blobs([50, 7])[0], num_routes=2)
    assert "'cluster-1' (7)" in caplog.text


POINTS = blobs()[0]
NAN = POINTS.copy()
NAN[4, 2] = np.nan
TWICE = np.repeat(POINTS[:3], 20, axis=0)
ZEROS = np.array([[0.0], [-0.0], [1.0], [1.0]])
CLOUD = np.random.default_rng(0).uniform(size=(30, 2))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (POINTS, {}, "`num_routes` is None and `min_cluster_size` is None; give one"),
        (POINTS, {"num_routes": 2, "min_cluster_size": 5}, "`num_routes` is 2 and `min_cluster_size` is 5; give one"),
        (POINTS, {"num_routes": 1}, "`num_routes` must be at least 2, got 1"),
        (POINTS, {"num_routes": 2.0}, "`num_routes` must be an int, got 2.0"),
        (POINTS, {"num_routes": 96}, "`num_routes` is 96; the 95 samples have only 95 distinct points"),
        (TWICE, {"num_routes": 4}, "`num_routes` is 4; the 60 samples have only 3 distinct points"),
        (ZEROS, {"num_routes": 3}, "`num_routes` is 3; the 4 samples have only 2 distinct points"),
        (
            POINTS,
            {"num_routes": 90},
            "`num_routes` = 90 makes routes of 2, .* 1 samples; every route needs at least 2",
        ),
        (POINTS, {"min_cluster_size": 1}, "`min_cluster_size` must be at least 2, got 1"),
        (POINTS, {"min_cluster_size": 48}, "`min_cluster_size` is 48; two clusters .* there are only 95 points"),
        (CLOUD, {"min_cluster_size": 13}, "`min_cluster_size` = 13 finds 0 clusters among 30 points and leaves 30 of"),
        (np.ones((9, 3)), {"num_routes": 2}, "`features` gives the same point 9 times"),
        (np.ones((9, 3)), {"min_cluster_size": 2}, "`features` gives the same point 9 times"),
        (NAN, {"num_routes": 2}, "`features` has NaN or infinite values at sample 4"),
        (np.ones((0, 3)), {"num_routes": 2}, r"`features` has shape \[0, 3\]"),
        (np.ones(9), {"num_routes": 2}, r"`features` has shape \[9\]"),
    ],
)
def test_refused_features(features, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        partition_by_features(features, **options)
    with pytest.raises(TypeError, match="`features` is a `int64` array"):
        partition_by_features(np.ones((4, 2), dtype=np.int64), **options)


THEMES = {
    "fish": ["cod", "eel", "ray", "tuna", "bass", "carp", "pike"],
    "tree": ["oak", "elm", "fir", "ash", "yew", "box"],
    "tool": ["saw", "axe", "file", "awl", "plane"],
}
NAMES = list(itertools.chain.from_iterable(THEMES.values()))


def encode(names):
    """Embeddings of 16 numbers, whose directions are close within a theme."""
    theme = {name: index for index, names_of_theme in enumerate(THEMES.values()) for name in names_of_theme}
    noise = np.random.default_rng(0).normal(size=(len(NAMES), 16))
    points = [5 * np.eye(3, 16)[theme[name]] + 0.2 * noise[NAMES.index(name)] for name in names]
    return np.array(points, dtype=np.float32)


EXPECTED = {f"cluster-{index}": sorted(names) for index, names in enumerate(THEMES.values())}


@pytest.mark.slow
def test_class_names_are_grouped_by_their_meaning(tmp_path):
    dataset = hf_dataset({"label": list(range(len(NAMES))) * 2}, label=NAMES)
    partition = partition_by_class_names(dataset, encode)
    assert partition.rule == ByGroups("label", EXPECTED)
    assert partition.counts.tolist() == [14, 12, 10]
    assert partition.route_ids.tolist() == [0] * 7 + [1] * 6 + [2] * 5 + [0] * 7 + [1] * 6 + [2] * 5
    # The order of samples and of classes does not matter.
    shuffled = DictDataset(label=NAMES[::-1] * 2)
    assert partition_by_class_names(shuffled, encode).rule == partition.rule
    save_rule(tmp_path, partition.rule)
    assert load_rule(tmp_path).assign(DictDataset(label=["yew", "cod"])).route_ids.tolist() == [1, 0]
    with pytest.raises(ValueError, match="Column 'label' has 'gnu', which no group has"):
        partition.rule.assign(DictDataset(label=["yew", "gnu"]))


@pytest.mark.slow
def test_the_projection_depends_on_the_seed_alone():
    points = encode(NAMES[:9])
    first, second, third = (clustering.reduce_dimensions(points, 5, 2, seed) for seed in (0, 0, 1))
    assert first.shape == (9, 2)
    assert (first == second).all()
    assert (first != third).any()


def test_names_that_are_left_out_join_the_nearest_cluster(monkeypatch):
    # Ten names form two clusters on a line. Five far outside them join so that the smaller cluster becomes the larger.
    line = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 9.0, 9.1, 9.2, 9.3, -20.0, 40.0, 70.0, 110.0, 160.0]
    monkeypatch.setattr(clustering, "reduce_dimensions", lambda points, *options: points)
    names = [f"name {index:02}" for index in range(15)]
    given = []

    def encoder(texts):
        given.append(texts)
        return torch.tensor(line)[:, None]

    groups = group_class_names(names, encoder, min_cluster_size=4)
    # Nearest by the clusters' means .25 and 9.15, as explicit sums.
    expected = {"cluster-0": [], "cluster-1": []}
    for name, place in zip(names, line, strict=True):
        first, second = sum(line[:6]) / 6, sum(line[6:10]) / 4
        expected["cluster-1" if abs(place - first) < abs(place - second) else "cluster-0"].append(name)
    assert groups == expected
    assert [len(group) for group in groups.values()] == [8, 7]
    assert given == [names]


def test_groups_that_are_not_far_apart_are_told_apart(monkeypatch):
    # Two of three groups are near each other. HDBSCAN's default, the density of four points, would join these.
    line = [0.6, 0.3, 0.0, 0.0, 0.8, 0.9, 2.1, 2.2, 2.0, 2.4, 2.3, 1.5, 8.9, 8.0, 8.7, 8.2, 8.9, 8.5]
    monkeypatch.setattr(clustering, "reduce_dimensions", lambda points, *options: points)
    groups = group_class_names(NAMES, lambda names: np.array(line)[:, None])
    assert sorted(groups.values()) == sorted([NAMES[:6], NAMES[6:12], NAMES[12:]])


def test_umap_gets_the_given_arguments(monkeypatch):
    asked = []
    monkeypatch.setattr(clustering, "reduce_dimensions", lambda points, *options: asked.append(options) or points)
    group_class_names(NAMES, encode)
    group_class_names(NAMES, encode, num_neighbors=4, num_dimensions=3, seed=7)
    assert asked == [(5, 2, 0), (4, 3, 7)]
    asked.clear()
    group_class_names(NAMES, encode, num_neighbors=100)
    assert asked == [(17, 2, 0)]


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (encode, {"min_cluster_size": 10}, "`min_cluster_size` is 10; .* there are only 18 points"),
        (encode, {"min_cluster_size": 1}, "`min_cluster_size` must be at least 2, got 1"),
        (encode, {"num_neighbors": 1}, "`num_neighbors` must be at least 2, got 1"),
        (encode, {"num_dimensions": 0}, "`num_dimensions` must be at least 1, got 0"),
        (encode, {"num_dimensions": 17}, "`num_dimensions` is 17; at most 16 is allowed for 18 names"),
        (lambda names: encode(names)[1:], {}, r"`encoder` gives shape \[17, 16\] for 18 names"),
        (lambda names: encode(names)[0], {}, r"`encoder` has shape \[16\]"),
        (lambda names: np.ones((18, 4)), {}, "`encoder` gives the same point 18 times"),
        (lambda names: encode(names) * np.nan, {}, "`encoder` has NaN or infinite values at sample 0"),
    ],
)
def test_refused_encoders_and_numbers(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        group_class_names(NAMES, encoder, **options)


def test_refused_names():
    with pytest.raises(TypeError, match="`encoder` is `list`"):
        group_class_names(NAMES, lambda names: encode(names).tolist())
    with pytest.raises(ValueError, match="`names` has 'cod' more than once"):
        group_class_names([*NAMES, "cod"], encode)
    with pytest.raises(ValueError, match="`label_column` 'label' has integers, which mean nothing"):
        partition_by_class_names(DictDataset(label=[0, 1, 0, 1]), encode)
    with pytest.raises(ValueError, match="`dataset` is empty"):
        partition_by_class_names([], encode)


def test_umap_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r'need umap-learn: pip install "hf_rtl\[clusters\]"'):
        group_class_names(NAMES, encode)
