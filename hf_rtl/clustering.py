"""Partitions made by clustering: of the samples' features, or of the meanings of class names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from .data.columns import find_label_column, read_column
from .data.partition import Partition
from .data.partition_by import partition_by_groups
from .data.rules import ByCentres, check_features
from .modeling.checks import check_integer


logger = logging.getLogger(__name__)


def partition_by_features(
    features: Any, *, num_routes: int | None = None, min_cluster_size: int | None = None, seed: int = 0
) -> Partition:
    """
    The partition by clusters of features: k-means for `num_routes`, HDBSCAN for `min_cluster_size`.

    Its `rule` is a [`ByCentres`] of the clusters' means. Every sample goes to the nearest centre, also those that are
    clustered here: so HDBSCAN's noise has a route, and training data and new data are treated in the same way. Routes
    are `"cluster-0"`, `"cluster-1"`, …, the largest cluster first. The number of threads changes nothing.

    Args:
        features (`np.ndarray` or `Tensor`): floats `[N, D]`, a row for each sample. Distances are Euclidean: scale
            features to unit length if only their direction counts.
        num_routes (`int`, *optional*): number of clusters, from 2.
        min_cluster_size (`int`, *optional*): least number of samples in a cluster, from 2; HDBSCAN finds the number of
            clusters. Give either this or `num_routes`.
        seed (`int`, defaults to 0): of k-means; HDBSCAN has no randomness.

    Raises:
        TypeError: `features` are not floats.
        ValueError: `features` are not `[N, D]`, empty, not finite, or all the same; both or none of `num_routes` and
            `min_cluster_size` are given; fewer distinct samples than `num_routes`; HDBSCAN finds fewer than two
            clusters; a cluster's centre is nearest to fewer than two samples.
    """
    points = _check_points("features", features)
    if num_routes is not None and min_cluster_size is None:
        argument = f"`num_routes` = {num_routes}"
        check_integer("num_routes", num_routes, minimum=2)
        _check_num_distinct(points, num_routes)
        clusters = _kmeans(points, num_routes, seed)
    elif min_cluster_size is not None and num_routes is None:
        argument = f"`min_cluster_size` = {min_cluster_size}"
        _check_cluster_size(min_cluster_size, len(points))
        clusters = _hdbscan(points, min_cluster_size)
    else:
        raise ValueError(
            f"`num_routes` is {num_routes} and `min_cluster_size` is {min_cluster_size}; give one: the first for "
            "k-means, the second for HDBSCAN."
        )
    rule = ByCentres(torch.from_numpy(_means(points, clusters)), _names(clusters))
    assigned = rule.assign(points)
    if assigned.counts.min() < 2:
        sizes = ", ".join(map(str, assigned.counts.tolist()))
        raise ValueError(f"{argument} makes routes of {sizes} samples; every route needs at least 2. Choose another.")
    if min_cluster_size is not None:
        logger.info(
            "HDBSCAN finds %d clusters and leaves %d of %d samples out; %d others are nearer to another centre.",
            len(rule.route_names),
            (clusters < 0).sum(),
            len(points),
            ((clusters >= 0) & (clusters != assigned.route_ids)).sum(),
        )
    partition = Partition(assigned.route_ids, rule.route_names, rule=rule)
    partition.warn_of_tiny_routes()
    return partition


def partition_by_class_names(
    dataset: Any,
    encoder: Callable[[list[str]], Any],
    label_column: str | None = None,
    *,
    min_cluster_size: int = 4,
    num_neighbors: int = 5,
    num_dimensions: int = 2,
    seed: int = 0,
) -> Partition:
    """
    The partition by groups of classes whose names mean similar things, as [`group_class_names`] finds them.

    Its `rule` is a [`ByGroups`]. The rule does not use the encoder, so it refuses new classes.

    Args:
        dataset (`datasets.Dataset` or a map-style data set of dicts): training data, as for `partition_by_column`. Its
            labels are class names or strings; the labels that its samples have are grouped.
        label_column (`str`, *optional*): defaults to the data set's `label`, `labels` or `fine_label`.
        encoder, min_cluster_size, num_neighbors, num_dimensions, seed: as for `group_class_names`.

    Raises:
        ImportError: umap-learn is not installed.
        TypeError, ValueError: what `partition_by_groups` and `group_class_names` refuse; labels without names.
    """
    column = find_label_column(dataset) if label_column is None else label_column
    names = set(read_column(dataset, column)[0])
    if any(isinstance(name, int) for name in names):
        raise ValueError(f"`label_column` {column!r} has integers, which mean nothing; class names are needed.")
    groups = group_class_names(
        sorted(names),
        encoder,
        min_cluster_size=min_cluster_size,
        num_neighbors=num_neighbors,
        num_dimensions=num_dimensions,
        seed=seed,
    )
    return partition_by_groups(dataset, groups, column)


def group_class_names(
    names: Sequence[str],
    encoder: Callable[[list[str]], Any],
    *,
    min_cluster_size: int = 4,
    num_neighbors: int = 5,
    num_dimensions: int = 2,
    seed: int = 0,
) -> dict[str, list[str]]:
    """
    Groups of names, as the paper makes them for CIFAR-100 (paper, section 4): text embeddings, projected by UMAP,
    clustered by HDBSCAN. Names that HDBSCAN leaves out go to the cluster with the nearest mean in the projection.

    Groups are called `"cluster-0"`, `"cluster-1"`, …, the largest first. They depend on the versions of umap-learn and
    numba; save them, under better names, as the mapping file of `partition_by_groups`.

    Args:
        names (`Sequence[str]`): C distinct names.
        encoder (`Callable`): from a list of C strings to their embeddings, floats `[C, D]`, an array or a tensor; any
            sentence encoder, such as the `encode` of a sentence-transformers model.
        min_cluster_size (`int`, defaults to 4): least number of names in a cluster, before left-out names join it.
        num_neighbors (`int`, defaults to 5): UMAP's `n_neighbors`, or C - 1 if that is less; more give larger groups.
        num_dimensions (`int`, defaults to 2): of the projection.
        seed (`int`, defaults to 0): of UMAP.

    Raises:
        ImportError: umap-learn is not installed.
        TypeError: `encoder` gives no floats.
        ValueError: a name is repeated; `encoder` gives no `[C, D]` of finite numbers, or the same for all names; an
            argument is out of range; HDBSCAN finds fewer than two clusters.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`names` has {', '.join(map(repr, twice))} more than once; names must be distinct.")
    _check_cluster_size(min_cluster_size, len(names))
    check_integer("num_neighbors", num_neighbors, minimum=2)
    check_integer("num_dimensions", num_dimensions, minimum=1)
    embeddings = _check_points("encoder", encoder(list(names)))
    if len(embeddings) != len(names):
        raise ValueError(
            f"`encoder` gives shape {list(embeddings.shape)} for {len(names)} names; a row each is needed."
        )
    if num_dimensions > len(names) - 2:
        raise ValueError(
            f"`num_dimensions` is {num_dimensions}; at most {len(names) - 2} is allowed for {len(names)} names."
        )
    points = reduce_dimensions(embeddings, min(num_neighbors, len(names) - 1), num_dimensions, seed)
    # `min_samples` is `min_cluster_size` by default: with so few points HDBSCAN then often finds a single cluster.
    clusters = _hdbscan(points, min_cluster_size, min_samples=1)
    means = _means(points, clusters)
    for index in np.flatnonzero(clusters < 0):
        clusters[index] = np.square(means - points[index]).sum(axis=1).argmin()
    clusters = _largest_first(clusters)
    return {
        route_name: [name for name, cluster in zip(names, clusters, strict=True) if cluster == route]
        for route, route_name in enumerate(_names(clusters))
    }


def reduce_dimensions(points: np.ndarray, num_neighbors: int, num_dimensions: int, seed: int) -> np.ndarray:
    """UMAP's projection of points by cosine distance, `float32 [C, num_dimensions]`. Needs umap-learn."""
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError('clusters of class names need umap-learn: pip install "hf_rtl[clusters]"') from error

    reducer = UMAP(
        n_neighbors=num_neighbors,
        n_components=num_dimensions,
        metric="cosine",
        min_dist=0.0,  # as its documentation advises for clustering
        random_state=seed,
        n_jobs=1,
    )
    with threadpool_limits(limits=1):
        return reducer.fit_transform(points)


def _kmeans(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """The cluster of each point, `int64 [N]`, the largest first."""
    from sklearn.cluster import KMeans

    # Several threads would add sums in the order in which they end.
    with threadpool_limits(limits=1):
        clusters = KMeans(num_clusters, n_init=10, random_state=seed).fit(points.astype(np.float64)).labels_
    return _largest_first(clusters)


def _hdbscan(points: np.ndarray, min_cluster_size: int, min_samples: int | None = None) -> np.ndarray:
    """The cluster of each point, `int64 [N]`, the largest first; -1 for points that are left out."""
    from sklearn.cluster import HDBSCAN

    with threadpool_limits(limits=1):
        clusters = HDBSCAN(min_cluster_size, min_samples=min_samples, copy=True).fit(points.astype(np.float64)).labels_
    num_clusters = int(clusters.max()) + 1
    if num_clusters < 2:
        raise ValueError(
            f"`min_cluster_size` = {min_cluster_size} finds {num_clusters} clusters among {len(points)} points and "
            f"leaves {(clusters < 0).sum()} of them out; a partition needs at least 2. Choose a smaller size."
        )
    return _largest_first(clusters)


def _largest_first(clusters: np.ndarray) -> np.ndarray:
    """The clusters renumbered by their sizes; of equal sizes, in the old order. -1 stays."""
    order = np.argsort(-np.bincount(clusters[clusters >= 0]), kind="stable")
    ranks = np.append(np.argsort(order), -1)
    return ranks[clusters]


def _means(points: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Mean of each cluster, `float64 [K, D]`."""
    return np.stack(
        [points[clusters == cluster].mean(axis=0, dtype=np.float64) for cluster in range(clusters.max() + 1)]
    )


def _names(clusters: np.ndarray) -> list[str]:
    return [f"cluster-{cluster}" for cluster in range(clusters.max() + 1)]


def _check_points(name: str, points: Any) -> np.ndarray:
    points = check_features(name, points)
    if (points == points[0]).all():
        raise ValueError(f"`{name}` gives the same point {len(points)} times; points that differ are needed.")
    return points


def _check_cluster_size(min_cluster_size: int, num_points: int) -> None:
    check_integer("min_cluster_size", min_cluster_size, minimum=2)
    if 2 * min_cluster_size > num_points:
        raise ValueError(
            f"`min_cluster_size` is {min_cluster_size}; two clusters of that size are needed, but there are only "
            f"{num_points} points."
        )


def _check_num_distinct(points: np.ndarray, num_routes: int) -> None:
    distinct: set[bytes] = set()
    for point in points + 0.0:  # makes -0.0 the same bytes as 0.0
        distinct.add(point.tobytes())
        if len(distinct) == num_routes:
            return
    raise ValueError(
        f"`num_routes` is {num_routes}; the {len(points)} samples have only {len(distinct)} distinct points."
    )
