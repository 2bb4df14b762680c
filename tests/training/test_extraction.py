"""The assignment of routes to processes in extraction. Whole searches are in `test_trainer_*.py`."""

import itertools

import numpy as np
import pytest

from hf_rtl.training.extraction import assign_routes


def loads(costs, assigned):
    return [sum(costs[route] for route in routes) for routes in assigned]


@pytest.mark.parametrize(("num_routes", "world_size"), itertools.product((1, 2, 5, 8), (1, 2, 3, 8)))
def test_routes_are_dealt_out_once_each(num_routes, world_size):
    for costs in ([1] * num_routes, list(range(num_routes)), [0] * num_routes):
        assigned = assign_routes(costs, world_size)
        assert len(assigned) == world_size
        assert sorted(itertools.chain(*assigned)) == list(range(num_routes))
        assert all(routes == sorted(routes) for routes in assigned)
        if len(set(costs)) == 1:
            assert max(map(len, assigned)) - min(map(len, assigned)) <= 1
        assert assign_routes(costs, world_size) == assigned


def test_a_large_route_is_alone():
    assert assign_routes([10, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert assign_routes([1, 2, 3, 4], 2) == [[0, 3], [1, 2]]


def test_no_process_has_much_more_to_do_than_the_best_possible():
    """Against every assignment: the largest load is within 4/3, the bound of assigning the longest first."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        costs = generator.integers(1, 20, size=7).tolist()
        for world_size in (2, 3):
            ways = itertools.product(range(world_size), repeat=len(costs))
            best = min(max(np.bincount(way, weights=costs, minlength=world_size)) for way in ways)
            assert max(loads(costs, assign_routes(costs, world_size))) <= best * 4 / 3
