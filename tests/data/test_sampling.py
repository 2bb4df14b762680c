"""Composition, order, balance and purity of single-route batches, and the data set that serves them."""

import random
from collections import Counter
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from accelerate import data_loader

from hf_rtl.data.sampling import ALL_ROUTES, RouteBatchSampler, RoutedDataset, RouteSample


# Three routes of 7, 4 and 10 samples, not in order.
ROUTE_IDS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [7, 4, 10]))


def sampler(membership=True, batch_size=4, seed=0, num_routes=3, route_ids=ROUTE_IDS, **arguments):
    return RouteBatchSampler(
        route_ids, num_routes=num_routes, batch_size=batch_size, membership=membership, seed=seed, **arguments
    )


def epochs(batch_sampler, num_epochs):
    batches = []
    for epoch in range(num_epochs):
        batch_sampler.set_epoch(epoch)
        batches.append(list(batch_sampler))
    return batches


@pytest.mark.parametrize("membership", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_routes_take_turns_in_full_batches(membership, steps):
    batches = sampler(membership, gradient_accumulation_steps=steps)
    own_per_batch = 2 if membership else 4
    updates = 1
    while any(updates * steps * own_per_batch < count for count in (7, 4, 10)):
        updates += 1
    assert batches.num_updates_per_route == updates
    drawn = list(batches)
    assert len(drawn) == len(batches) == updates * 3 * steps
    expected = [route for _ in range(updates) for route in (0, 1, 2) for _ in range(steps)]
    for batch, route in zip(drawn, expected, strict=True):
        assert len(batch) == 4
        assert {sample.route for sample in batch} == {route}
        assert all(type(value) is int for sample in batch for value in sample[:3])


def test_the_largest_route_decides_the_number_of_updates():
    assert sampler(batch_size=20).num_updates_per_route == 1  # 10 positives a batch
    assert sampler(batch_size=18).num_updates_per_route == 2
    assert sampler(membership=False, batch_size=10).num_updates_per_route == 1
    assert sampler(membership=False, batch_size=9).num_updates_per_route == 2
    assert sampler(routes=[1]).num_updates_per_route == 2  # its own 4 samples, not the 10 of another


def test_every_sample_of_a_route_comes_once_before_one_comes_again():
    for membership in (False, True):
        for route, count in enumerate((7, 4, 10)):
            stream = [
                sample.index
                for sample in chain.from_iterable(sampler(membership))
                if sample.route == route and ROUTE_IDS[sample.index] == route
            ]
            assert len(stream) == (10 if membership else 12)
            members = np.flatnonzero(route == ROUTE_IDS).tolist()
            while stream:
                head, stream = stream[:count], stream[count:]
                assert len(set(head)) == len(head)
                assert set(head) <= set(members)
                assert len(head) < count or sorted(head) == members


def test_routes_and_their_permutations_are_independent():
    route_ids = np.array([0] * 16 + [1] * 16 + [2] * 64)
    batches = sampler(membership=False, batch_size=16, route_ids=route_ids)
    orders = [tuple(sample.index % 16 for sample in batch) for batch in batches if batch[0].route < 2]
    assert len(orders) == 8 == len(set(orders))  # four permutations of each of two routes
    assert all(sorted(order) == list(range(16)) for order in orders)


def test_a_membership_batch_alternates_positives_and_negatives():
    for batch in sampler():
        assert [ROUTE_IDS[sample.index] == sample.route for sample in batch] == [True, False, True, False]


def test_negatives_are_uniform_over_all_other_samples_and_fresh_each_epoch():
    counts, sets = Counter(), set()
    for batches in epochs(sampler(routes=[0]), 400):
        negatives = [sample.index for sample in chain.from_iterable(batches) if ROUTE_IDS[sample.index] != 0]
        assert len(negatives) == 8 == len(set(negatives))  # no repeats while other samples are left
        counts.update(negatives)
        sets.add(tuple(negatives))
    assert len(sets) == 400
    assert sorted(counts) == np.flatnonzero(ROUTE_IDS != 0).tolist()
    # 400 draws of 8 of 14 samples: each count has mean 228.6 and standard deviation 9.9.
    assert all(abs(count - 400 * 8 / 14) < 50 for count in counts.values())


def test_few_negatives_repeat_evenly():
    route_ids = np.array([0] * 10 + [1] * 3)
    batches = list(sampler(route_ids=route_ids, num_routes=2, routes=[0]))
    counts = Counter(sample.index for sample in chain.from_iterable(batches) if sample.index >= 10)
    assert sorted(counts.values()) == [3, 3, 4]


def test_a_stream_depends_on_seed_key_epoch_and_route_alone():
    def route_stream(route, epoch=0, **arguments):
        batches = sampler(**arguments)
        batches.set_epoch(epoch)
        return [sample.index for sample in chain.from_iterable(batches) if sample.route == route]

    assert route_stream(0) == route_stream(0)
    # The stream depends neither on the other routes, nor on how a batch is cut into accumulation steps, nor on the
    # global generators. The shorter stream is the beginning of the longer one.
    np.random.seed(1)
    torch.manual_seed(1)
    alone = route_stream(0, routes=[0])
    assert alone == route_stream(0)[: len(alone)] and len(alone) == 16
    assert route_stream(0, routes=[0, 2], gradient_accumulation_steps=2) == route_stream(0, batch_size=8)
    variants = [
        route_stream(0, **a) for a in ({}, {"seed": 1}, {"key": (0,)}, {"key": (1,)}, {"key": (1, 0)}, {"epoch": 1})
    ]
    assert len({tuple(variant) for variant in variants}) == len(variants)


def test_routes_come_in_the_given_order():
    assert [batch[0].route for batch in sampler(routes=[2, 0])] == [2, 0] * 5


@pytest.mark.parametrize("membership", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_batches_of_one_process(membership, world_size):
    arguments = {"membership": membership, "batch_size": 16, "gradient_accumulation_steps": 2}
    whole = epochs(sampler(**arguments), 2)
    ranks = [epochs(sampler(**arguments, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
    for epoch in range(2):
        for step, batch in enumerate(whole[epoch]):
            slices = [ranks[rank][epoch][step] for rank in range(world_size)]
            assert sorted(chain.from_iterable(slices)) == sorted(batch)
            for part in slices:
                assert len(part) == 16 // world_size
                if membership:
                    assert sum(ROUTE_IDS[sample.index] == sample.route for sample in part) == len(part) // 2


def test_rank_slices_by_hand():
    route_ids = np.array([0] * 8 + [1] * 8)
    occurrences = {
        (membership, rank): [sample.occurrence for sample in next(iter(batches))]
        for membership in (False, True)
        for rank in (0, 1)
        for batches in [sampler(membership, 8, route_ids=route_ids, num_routes=2, rank=rank, world_size=2)]
    }
    assert occurrences == {
        (False, 0): [0, 2, 4, 6],
        (False, 1): [1, 3, 5, 7],
        (True, 0): [0, 1, 4, 5],
        (True, 1): [2, 3, 6, 7],
    }


@pytest.mark.parametrize("membership", [False, True])
def test_draws_never_repeat_over_a_run(membership):
    drawn = list(chain.from_iterable(chain.from_iterable(epochs(sampler(membership), 5))))
    assert len(set(drawn)) == len(drawn)
    of_route = sorted(sample.occurrence for sample in drawn if sample.route == 1)
    assert of_route == list(range(len(drawn) // 3))


def test_iterating_again_repeats_the_epoch_until_another_is_set():
    batches = sampler()
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    assert [sample.index for sample in chain.from_iterable(batches)] != [s.index for s in chain.from_iterable(first)]
    batches.set_epoch(0)
    assert list(batches) == first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 5}, ValueError, "`batch_size` is 5; with 1 process.* multiple of 2"),
        ({"batch_size": 6, "world_size": 2}, ValueError, "with 2 process.* multiple of 4"),
        ({"batch_size": 5, "world_size": 2, "membership": False}, ValueError, "multiple of 2"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 4.0}, TypeError, "`batch_size` must be an int, got 4.0, a `float`"),
        ({"membership": "labels"}, TypeError, "`membership` is 'labels'"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0, got -1"),
        ({"key": (1, -2)}, ValueError, "`key` must be at least 0, got -2"),
        ({"key": 1}, TypeError, r"`key` is 1, a `int`; a tuple"),
        ({"routes": [0, 3]}, ValueError, r"`routes` is \[0, 3\]; distinct ids from 0 to 2"),
        ({"routes": [1, 1]}, ValueError, "distinct ids"),
        ({"routes": []}, ValueError, "distinct ids"),
        ({"rank": 2, "world_size": 2}, ValueError, "`rank` is 2; allowed are 0 to 1"),
        ({"gradient_accumulation_steps": 0}, ValueError, "`gradient_accumulation_steps` must be at least 1, got 0"),
        ({"num_routes": 2}, ValueError, "`route_ids` has 2 at sample"),
        ({"num_routes": 4}, ValueError, "Route 3 has no samples"),
        ({"route_ids": np.zeros(4, dtype=int), "num_routes": 1}, ValueError, "no negatives"),
        ({"route_ids": [0, 1, 2]}, TypeError, "`route_ids` is `list`"),
    ],
)
def test_sampler_refuses_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        sampler(**arguments)
    if "num_routes" in arguments and arguments["num_routes"] == 4:
        assert len(list(sampler(num_routes=4, routes=[0, 1]))) == 8  # an empty route may sit out


def test_set_epoch_refuses_bad_input():
    with pytest.raises(ValueError, match="`epoch` must be at least 0, got -1"):
        sampler().set_epoch(-1)
    with pytest.raises(TypeError, match="`epoch` must be an int, got 0.5"):
        sampler().set_epoch(0.5)


class NoisyDataset(torch.utils.data.Dataset):
    """Each item draws from the three global generators, as a random transform would."""

    def __len__(self):
        return len(ROUTE_IDS)

    def __getitem__(self, index):
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"x": torch.tensor([index, *noise], dtype=torch.float64), "label": int(ROUTE_IDS[index])}


class CountingDataset(NoisyDataset):
    """Serves a batch at a time, and counts the calls."""

    def __init__(self):
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(indices)
        return [{"x": index, "label": int(ROUTE_IDS[index])} for index in indices]


def routed(dataset=None, membership=True, seed=0, **arguments):
    arguments = {"label_column": "label", "route_ids": ROUTE_IDS} | arguments
    dataset = NoisyDataset() if dataset is None else dataset
    return RoutedDataset(dataset, membership=membership, seed=seed, **arguments)


def test_membership_replaces_the_label():
    positive, negative = int(np.flatnonzero(ROUTE_IDS == 1)[0]), int(np.flatnonzero(ROUTE_IDS != 1)[0])
    items = routed().__getitems__([RouteSample(positive, 1, 0), RouteSample(negative, 1, 1)])
    assert [(item["labels"], item["route_ids"], item["x"][0].item()) for item in items] == [
        (1, 1, positive),
        (0, 1, negative),
    ]
    assert all(set(item) == {"x", "labels", "route_ids"} for item in items)
    assert all(type(item["labels"]) is int and type(item["route_ids"]) is int for item in items)
    assert routed()[RouteSample(negative, 1, 1)]["x"].equal(items[1]["x"])
    kept = routed(label_column=None)[RouteSample(positive, 1, 0)]
    assert kept["label"] == kept["labels"] == 1


def test_label_tickets_keep_the_label_and_the_base_keeps_its_items():
    base = [{"x": 1, "label": 5}, {"x": 2, "label": 6}]
    dataset = RoutedDataset(base, route_ids=np.array([0, 1]), membership=False, seed=0, label_column="label")
    assert len(dataset) == 2
    assert dataset[RouteSample(1, 1, 0)] == {"x": 2, "label": 6, "route_ids": 1}
    dataset = RoutedDataset(base, route_ids=np.array([0, 1]), membership=True, seed=0, label_column="label")
    assert dataset[RouteSample(1, 0, 0)] == {"x": 2, "labels": 0, "route_ids": 0}
    assert base == [{"x": 1, "label": 5}, {"x": 2, "label": 6}]


def test_random_transforms_depend_on_the_draw_alone():
    draws = [RouteSample(3, 0, 5), RouteSample(8, 0, 6), RouteSample(3, 0, 11), RouteSample(3, 2, 5)]
    items = [item["x"] for item in routed().__getitems__(draws)]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    again = [routed()[draw]["x"] for draw in reversed(draws)][::-1]
    assert all(item.equal(other) for item, other in zip(items, again, strict=True))
    noise = torch.stack([*[item[1:] for item in items], routed(seed=1)[draws[0]]["x"][1:]])
    noise = torch.cat([noise, routed()[draws[0]._replace(key=(1,))]["x"][None, 1:]])
    for generator in range(3):
        assert len(noise[:, generator].unique()) == 6


@pytest.mark.parametrize("seed_transforms", [True, False])
def test_global_generators_are_as_they_were(seed_transforms):
    dataset = routed(CountingDataset() if not seed_transforms else None, seed_transforms=seed_transforms)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    dataset.__getitems__([RouteSample(3, 0, 5), RouteSample(8, 0, 6)])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_global_generators_are_put_back_after_an_error():
    class Broken(NoisyDataset):
        def __getitem__(self, index):
            raise OSError("unreadable")

    state = torch.get_rng_state()
    with pytest.raises(OSError, match="unreadable"):
        routed(Broken())[RouteSample(0, 0, 0)]
    assert torch.get_rng_state().equal(state)


def test_without_seeding_a_batch_is_one_call():
    base = CountingDataset()
    items = routed(base, seed_transforms=False).__getitems__([RouteSample(4, 1, 0), RouteSample(2, 1, 1)])
    assert base.calls == [[4, 2]]
    assert [item["x"] for item in items] == [4, 2]
    torch.manual_seed(0)
    unseeded = [routed(seed_transforms=False)[RouteSample(4, 1, 0)]["x"][3].item() for _ in range(2)]
    torch.manual_seed(0)
    assert unseeded == [torch.rand(()).item(), torch.rand(()).item()]


def test_routed_dataset_refuses_bad_input():
    with pytest.raises(TypeError, match="Items are addressed by `RouteSample`, got 3"):
        routed()[3]
    with pytest.raises(TypeError, match="`RouteSample`"):
        routed()[(3, 0, 0)]
    with pytest.raises(ValueError, match="`route_ids` has 20 entries and `dataset` 21"):
        routed(route_ids=ROUTE_IDS[:20])
    with pytest.raises(TypeError, match="`route_ids` is `list`"):
        routed(route_ids=ROUTE_IDS.tolist())
    with pytest.raises(TypeError, match=r"`dataset\[1\]` is a `tuple`"):
        routed(torch.utils.data.TensorDataset(torch.zeros(21)))[RouteSample(1, 0, 0)]
    with pytest.raises(TypeError, match="`seed_transforms` is 'no'"):
        routed(seed_transforms="no")
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -1"):
        routed(seed=-1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_that_accelerate_must_not_shard(num_workers):
    batches = sampler(batch_size=8, rank=1, world_size=2)
    loader = torch.utils.data.DataLoader(routed(), batch_sampler=batches, num_workers=num_workers)
    loader = data_loader.prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
    assert len(loader) == len(batches)
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        loaded = list(loader)
        expected = sampler(batch_size=8, rank=1, world_size=2)
        expected.set_epoch(epoch)
        for batch, samples in zip(loaded, expected, strict=True):
            assert batch["route_ids"].tolist() == [sample.route for sample in samples]
            assert batch["labels"].tolist() == [1, 0, 1, 0]
            assert batch["x"].equal(torch.stack([routed()[sample]["x"] for sample in samples]))


def test_datasets_are_served_with_and_without_seeding():
    base = datasets.Dataset.from_dict({"x": list(range(21)), "label": ROUTE_IDS.tolist()}).with_transform(
        lambda batch: {**batch, "noise": [random.random() for _ in batch["x"]]}
    )
    samples = next(iter(sampler()))
    for seed_transforms in (True, False):
        items = routed(base, seed_transforms=seed_transforms).__getitems__(samples)
        assert [item["x"] for item in items] == [sample.index for sample in samples]
        assert [item["labels"] for item in items] == [1, 0, 1, 0]
    first, second = (routed(base).__getitems__(samples) for _ in range(2))
    assert first == second


# Tickets that compete


def test_competing_epochs_draw_from_all_samples_alike():
    plain, competing = sampler(batch_size=12), sampler(batch_size=12, first_competing_epoch=2)
    assert len(competing) == len(plain)
    (first, second, third, fourth), (_, _, otherwise) = epochs(competing, 4), epochs(plain, 3)
    assert [first, second] == epochs(plain, 2) and third != otherwise
    for epoch in (third, fourth):
        assert len(epoch) == len(competing)
        # Three tickets see together as many samples as one ticket does in other batches.
        assert all(len(batch) == 4 for batch in epoch)
        assert {sample.route for batch in epoch for sample in batch} == {ALL_ROUTES}
        stream = [sample.index for batch in epoch for sample in batch]
        while len(stream) >= len(ROUTE_IDS):
            assert sorted(stream[: len(ROUTE_IDS)]) == list(range(len(ROUTE_IDS)))
            stream = stream[len(ROUTE_IDS) :]
    samples = [sample for batch in third + fourth for sample in batch]
    assert len(set(samples)) == len(samples) and [s.index for s in third[0]] != [s.index for s in fourth[0]]
    assert epochs(sampler(batch_size=12, first_competing_epoch=2), 4)[2:] == [third, fourth]
    assert epochs(sampler(batch_size=12, first_competing_epoch=2, seed=1), 3)[2] != third


def test_competing_batches_are_dealt_out_to_the_processes():
    whole = epochs(sampler(batch_size=12, first_competing_epoch=0), 1)[0]
    parts = [epochs(sampler(batch_size=12, first_competing_epoch=0, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    for batch, one, other in zip(whole, *parts, strict=True):
        assert len(one) == len(other) == 2
        assert [sample for pair in zip(one, other, strict=True) for sample in pair] == batch


def test_competing_batches_need_samples():
    for batch_size, size in ((4, 1), (16, 5)):
        with pytest.raises(ValueError, match=rf"fewer samples, {size}, .* take a multiple of 6\."):
            sampler(batch_size=batch_size, first_competing_epoch=0, membership=False, world_size=2)
    sampler(batch_size=20, first_competing_epoch=0, world_size=2)


def test_labels_of_competing_batches_are_home_routes():
    data = [{"x": index, "label": int(route)} for index, route in enumerate(ROUTE_IDS)]
    for seeded in (False, True):
        routed = RoutedDataset(
            data, route_ids=ROUTE_IDS, membership=True, seed=0, label_column="label", seed_transforms=seeded
        )
        batch = epochs(sampler(batch_size=12, first_competing_epoch=0), 1)[0][0]
        for item, sample in zip(routed.__getitems__(batch), batch, strict=True):
            assert item == {"x": sample.index, "labels": ROUTE_IDS[sample.index], "route_ids": ALL_ROUTES}
