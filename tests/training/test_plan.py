"""The plan of a run: rounds, numbers of events, steps."""

import dataclasses

import pytest

from hf_rtl.pruning import round_schedule
from hf_rtl.training.plan import Plan, make_rounds


def test_rounds_number_their_events_over_the_whole_run():
    rounds = make_rounds([[80, 75], [55, 50], [25]], [0.25, 0.5, 0.75], retrain_every_round=True)
    assert [round_.index for round_ in rounds] == [0, 1, 2]
    assert [round_.name for round_ in rounds] == [
        "round-01-sparsity-0.25",
        "round-02-sparsity-0.5",
        "round-03-sparsity-0.75",
    ]
    assert [round_.first_event for round_ in rounds] == [0, 2, 4]
    assert [round_.kept for round_ in rounds] == [[80, 75], [55, 50], [25]]
    assert [round_.sparsity for round_ in rounds] == [0.25, 0.5, 0.75]
    assert all(round_.retrained for round_ in rounds)


def test_only_the_last_round_may_be_retrained():
    rounds = make_rounds([[80], [50], [20]], [0.2, 0.5, 0.8], retrain_every_round=False)
    assert [round_.retrained for round_ in rounds] == [False, False, True]


def test_a_round_without_events_takes_no_number():
    rounds = make_rounds([[], [60], [30]], [0.0, 0.4, 0.7], retrain_every_round=True)
    assert [round_.first_event for round_ in rounds] == [0, 0, 1]
    assert rounds[0].name == "round-01-sparsity-0"


def test_folders_differ_even_where_sparsities_are_printed_alike():
    targets = [0.1234561, 0.1234562]
    rounds = make_rounds([[9], [8]], targets, retrain_every_round=True)
    assert len({round_.name for round_ in rounds}) == 2


@pytest.mark.parametrize("retrain_every_round", [True, False])
def test_a_plan_counts_trainings_and_steps(retrain_every_round):
    schedule = round_schedule(1000, [0.25, 0.5, 0.75], prune_schedule="constant", prune_amount=100)
    assert [len(events) for events in schedule] == [3, 3, 3]
    rounds = make_rounds(schedule, [0.25, 0.5, 0.75], retrain_every_round=retrain_every_round)
    plan = Plan(rounds, 1000, {"a": 10, "b": 20}, extraction_steps=[3, 5], retraining_steps=7)
    retrainings = 3 if retrain_every_round else 1
    assert plan.num_events == 9
    assert plan.num_trainings == 9 * 2 + retrainings
    assert plan.num_steps == 9 * (3 + 5) + retrainings * 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_weights = 5
