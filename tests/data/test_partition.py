"""Partitions: which routes there are, how many samples each has, and what is refused."""

import numpy as np
import pytest

from hf_rtl.data.partition import Partition, check_route_ids


def test_counts_and_names():
    partition = Partition(np.array([0, 2, 1, 2, 0, 1, 2], dtype=np.int32), ("a", "b", "c"))
    assert partition.counts.tolist() == [2, 2, 3]
    assert partition.route_ids.dtype == np.int64
    assert partition.route_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("route_ids", "error", "message"),
    [
        ([0, 0, 1, 1], TypeError, "`route_ids` is `list`"),
        (np.array([0.0, 0.0, 1.0, 1.0]), TypeError, "`route_ids` is a `float64` array"),
        (np.array([[0, 0], [1, 1]]), ValueError, r"`route_ids` has shape \[2, 2\]"),
        (np.array([], dtype=np.int64), ValueError, r"`route_ids` has shape \[0\]"),
        (np.array([0, 0, 1, 2]), ValueError, "`route_ids` has 2 at sample 3; allowed are 0 to 1"),
        (np.array([0, -1, 1, 1]), ValueError, "`route_ids` has -1 at sample 1"),
        (np.array([0, 0, 0]), ValueError, "Route 'dog' has no samples"),
        (np.array([0, 1, 1]), ValueError, "Route 'cat' has a single sample"),
    ],
)
def test_partition_refuses_bad_route_ids(route_ids, error, message):
    with pytest.raises(error, match=message):
        Partition(route_ids, ["cat", "dog"])


def test_partition_refuses_bad_names():
    for names in (["cat", "cat"], [], ["cat", ""], "ab"):
        with pytest.raises(ValueError, match="`route_names`"):
            Partition(np.array([0, 0, 1, 1]), names)


def test_evaluation_data_may_leave_routes_empty():
    partition = Partition(np.array([2]), ["a", "b", "c"], allow_empty=True)
    assert partition.counts.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="`route_ids` has 3"):
        Partition(np.array([3]), ["a", "b", "c"], allow_empty=True)


def test_route_ids_without_an_upper_bound():
    assert check_route_ids(np.array([1000, 0])).tolist() == [1000, 0]
    with pytest.raises(ValueError, match="allowed are ids from 0"):
        check_route_ids(np.array([0, -1]))


def test_check_of_the_ticket_task():
    pair = Partition(np.array([0, 0, 1, 1]), ["a", "b"])
    single = Partition(np.array([0, 0, 0, 0]), ["all"])
    pair.check("membership")
    pair.check("membership", labels=[5, 5, 5, 5])  # membership tickets do not read labels
    pair.check("labels", labels=[0, 1, 1, 0])
    pair.check("labels", labels=np.array(["x", "y", "x", "y"]))
    pair.check("labels")
    single.check("labels", labels=[0, 0, 0, 1])
    with pytest.raises(ValueError, match="'membership' needs at least 2 routes.*'all'"):
        single.check("membership")
    with pytest.raises(ValueError, match="Route 'b' has the single label 7.*`ticket_task='membership'`"):
        pair.check("labels", labels=[0, 1, 7, 7])
    with pytest.raises(ValueError, match="Route 'a' has the single label 'x'"):
        pair.check("labels", labels=["x", "x", "x", "y"])
    with pytest.raises(ValueError, match=r"`labels` has shape \[3\]"):
        pair.check("labels", labels=[0, 1, 1])
    with pytest.raises(ValueError, match="`ticket_task` must be one of 'membership', 'labels', got 'label'"):
        pair.check("label")
    Partition(np.array([0, 0]), ["a", "b"], allow_empty=True).check("labels", labels=[0, 1])


def test_the_report_has_a_line_for_each_route():
    partition = Partition(np.array([0] * 3 + [1] * 1500), ["rare", "a route with a long name"])
    assert [line.split() for line in partition.report().splitlines()] == [
        ["route", "samples", "share"],
        ["rare", "3", "0.2%"],
        ["a", "route", "with", "a", "long", "name", "1,500", "99.8%"],
        ["all", "1,503", "100.0%"],
    ]
    assert len({len(line) for line in partition.report().splitlines()}) == 1
    evaluated = Partition(np.array([0]), ["some", "none"], allow_empty=True)
    assert [line.split() for line in evaluated.report().splitlines()][2] == ["none", "0", "0.0%"]
