"""The same run on 1, 2 and 3 processes: the parts of its results that must be equal, and the number of processes."""

import numpy as np
import pytest

from tests.distributed import runs
from tests.distributed.processes import Team, launch


ONE_ROUND = {"target_sparsity": [0.3]}
TWO_EVENTS = {"target_sparsity": [0.5]}
SHORT = {"max_steps": 1}  # joint retraining, where it does not matter


def run_in_worlds(say, function, tmp_path, worlds, *arguments):
    """World size -> the results of each process. Asserts and shows the real number of processes."""
    teams = {}
    for world_size in worlds:  # all at the same time
        folder, logs = tmp_path / f"world-{world_size}", tmp_path / f"logs-{world_size}"
        teams[world_size] = Team(function, (str(folder), *arguments), world_size=world_size, logs=logs)
    made = {}
    for world_size, team in teams.items():
        results = team.results()
        assert [result["world_size"] for result in results] == [world_size] * world_size
        assert [result["rank"] for result in results] == list(range(world_size))
        say(f"{function.__name__}{arguments}: {world_size} asked for, {results[0]['world_size']} at work")
        made[world_size] = results
    return made


def distance(one, two, start):
    """The distance between the final weights of two trainings, relative to that of the first from its start."""
    names = [name for name in start if np.issubdtype(one[name].dtype, np.floating)]
    apart = sum(float(((one[name].astype(float) - two[name]) ** 2).sum()) for name in names)
    moved = sum(float(((one[name].astype(float) - start[name]) ** 2).sum()) for name in names)
    return (apart / moved) ** 0.5


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def initial_weights(kind, **options):
    model = runs.make_model(kind, **options)
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


# Extraction


@pytest.fixture(scope="module", params=[("timm", [1, 2]), ("vit", [1, 2, 3])], ids=["timm", "vit"])
def whole_runs(request, tmp_path_factory):
    """(kind of network, folder, lines for the summary, world size -> results) of uninterrupted runs."""
    kind, worlds = request.param
    folder, said = tmp_path_factory.mktemp(kind), []
    made = run_in_worlds(said.append, runs.train, folder, worlds, kind, {"max_steps": 3, **TWO_EVENTS})
    return kind, folder, said, made


@pytest.mark.slow
def test_masks_are_the_same_for_any_number_of_processes(say, whole_runs):
    _, folder, said, made = whole_runs
    for line in said:
        say(line)
    assert len({result["fingerprint"] for results in made.values() for result in results}) == 1
    files = [contents(folder / f"world-{world}" / "extraction") for world in made]
    assert len(files[0]) == 1 + 2 * 3 and all(others == files[0] for others in files)
    for results in made.values():
        for name, tensor in results[0]["state"].items():
            assert all(np.array_equal(tensor, other["state"][name]) for other in results), name


@pytest.mark.slow
def test_routes_of_different_sizes_are_balanced_and_a_process_may_have_none(say, tmp_path):
    """With 4 processes for 3 routes one has nothing to do; with 2, the largest route is alone."""
    options = {"extraction_steps": None, "extraction_epochs": 1.0, "route_batch_size": 8, **ONE_ROUND, **SHORT}
    made = run_in_worlds(say, runs.search_unequal_routes, tmp_path, [1, 2, 4], options)
    assert len({result["fingerprint"] for results in made.values() for result in results}) == 1
    assert {world_size: [result["steps"] for result in results] for world_size, results in made.items()} == {
        1: [{"ant": 6, "bee": 2, "cat": 3}],
        2: [{"ant": 6}, {"bee": 2, "cat": 3}],
        4: [{"ant": 6}, {"cat": 3}, {"bee": 2}, {}],
    }


@pytest.mark.slow
def test_extraction_is_continued_on_another_number_of_processes(tmp_path):
    options = {**TWO_EVENTS, **SHORT}
    whole = launch(runs.train, str(tmp_path / "whole"), "timm", options, world_size=1, logs=tmp_path / "logs")
    for first, then in ((2, 1), (1, 2)):
        folder, logs = str(tmp_path / f"{first}-{then}"), tmp_path / f"logs-{first}-{then}"
        broken = Team(runs.fail, (folder, "timm", "extraction", 0, options), world_size=first, logs=logs)
        assert any(broken.wait(60))
        done = len(list((tmp_path / f"{first}-{then}").glob("extraction/event-*/*")))
        assert 0 < done < 6
        results = launch(runs.train, folder, "timm", options, world_size=then, logs=logs)
        assert [result["world_size"] for result in results] == [then] * then
        assert {result["fingerprint"] for result in results} == {whole[0]["fingerprint"]}


@pytest.mark.slow
def test_a_ticket_can_be_checked_on_another_process(say, tmp_path):
    options = {"debug_determinism": True, **ONE_ROUND, **SHORT}
    made = run_in_worlds(say, runs.train, tmp_path, [1, 2], "vit", options)
    assert made[1][0]["fingerprint"] == made[2][0]["fingerprint"]
    team = Team(runs.compute_differently, (str(tmp_path / "other"), options), world_size=2, logs=tmp_path / "logs")
    assert any(team.wait(60))
    assert "`debug_determinism`: process 1 finds another mask of route 'ant'" in team.output()
    # Without `debug_determinism`, the difference goes unnoticed.
    unchecked = {**options, "debug_determinism": False}
    launch(runs.compute_differently, str(tmp_path / "unchecked"), unchecked, world_size=2, logs=tmp_path / "logs")


@pytest.mark.slow
def test_activity_of_units_does_not_depend_on_the_number_of_processes(say, tmp_path):
    units = {"prune_granularity": "neuron", "prune_criterion": "activity", "extraction_steps": 0}
    made = run_in_worlds(say, runs.train, tmp_path, [1, 2], "vit", {**units, **ONE_ROUND, **SHORT})
    assert made[1][0]["fingerprint"] == made[2][0]["fingerprint"] == made[2][1]["fingerprint"]


def test_other_masks_than_those_found_are_noticed_and_named(tmp_path):
    team = Team(runs.receive_other_masks, (str(tmp_path / "run"),), world_size=2, logs=tmp_path / "logs")
    assert any(team.wait(60))
    assert "process 1 has other masks of route 'ant'" in team.output()
    assert "than process 0, which found them" in team.output()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed", "seed: 42 and 7"),
        ("weights", "initial_weights: "),
        ("data", "first_batch: "),
        ("threads", "extraction_threads: 1 and 2"),
        ("version", "torch: "),
        ("precision", "matmul_precision: "),
    ],
)
def test_processes_that_would_find_other_tickets_are_refused_before_the_work(tmp_path, change, named):
    team = Team(runs.disagree, (str(tmp_path / "run"), change), world_size=2, logs=tmp_path / "logs")
    assert any(team.wait(60))
    assert f"processes 0 and 1 would not find the same tickets: they differ in {named}" in team.output()
    assert team.output().count("Traceback") == 1
    assert list((tmp_path / "run").iterdir()) == []  # `Trainer` makes the folder


@pytest.mark.slow
def test_all_processes_stop_at_a_collapse_that_the_first_one_sees(say, tmp_path):
    made = run_in_worlds(say, runs.stop_at_collapse, tmp_path, [1, 2], "timm", {"max_steps": 3})
    options = {"max_steps": 3, **ONE_ROUND}
    short = launch(runs.train, str(tmp_path / "short"), "timm", options, world_size=2, logs=tmp_path)
    for results in made.values():
        # Only the first process looks; all have the same metrics.
        assert [result["num_points"] for result in results] == [3, 0][: len(results)]
        assert all(result["similarity"] == made[1][0]["similarity"] for result in results)
        assert len(results[0]["similarity"]) == 1
        assert {result["fingerprint"] for result in results} == {short[0]["fingerprint"]}
    for result in made[2]:
        assert all(np.array_equal(result["state"][name], short[0]["state"][name]) for name in result["state"])
    assert not list((tmp_path / "world-2").glob("round-02*")) and (tmp_path / "world-2" / "final").exists()


# Joint retraining


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"max_steps": -1, "num_train_epochs": 4, "competing_epochs": 3, "route_batch_size": 36},
    ],
    ids=["plain", "accumulation", "competition"],
)
@pytest.mark.slow
def test_joint_weights_agree_to_rounding_in_double_precision(say, tmp_path, options):
    worlds = [1, 2] if options else [1, 3]
    made = run_in_worlds(say, runs.train_in, tmp_path, worlds, "vit", "float64", {**options, **ONE_ROUND})
    start = initial_weights("vit")
    ends = {world: results[0]["state"] for world, results in made.items()}
    assert all(str(end["backbone.classifier.weight"].dtype) == "float64" for end in ends.values())
    apart = distance(ends[1], ends[worlds[1]], start)
    say(f"vit, float64, {options}: worlds 1 and {worlds[1]} end {apart:.1e} of the movement apart")
    assert apart < 1e-9
    assert made[worlds[1]][0]["fingerprint"] == made[1][0]["fingerprint"]


@pytest.mark.slow
def test_joint_weights_agree_unless_there_is_batch_norm(say, whole_runs):
    """With batch norm, weights may differ: each process normalises its own part of a batch."""
    kind, _, _, made = whole_runs
    for world in list(made)[1:]:
        apart = distance(made[1][0]["state"], made[world][0]["state"], initial_weights(kind))
        say(f"{kind}, float32: worlds 1 and {world} end {apart:.1e} of the movement apart")
        assert apart < 1e-3 if kind == "vit" else 1e-3 < apart < 2


@pytest.mark.slow
def test_an_evaluation_before_training_does_not_take_the_processes_apart(say, tmp_path):
    states = []
    for function in (runs.train, runs.evaluate_and_train):
        folder = tmp_path / function.__name__
        made = run_in_worlds(say, function, folder, [2], "timm", {"max_steps": 3, **ONE_ROUND})
        states += [result["state"] for result in made[2]]
    for name, tensor in states[0].items():
        assert all(np.array_equal(tensor, other[name]) for other in states), name


@pytest.mark.slow
def test_every_process_has_its_part_of_the_same_batches(say, tmp_path):
    made = run_in_worlds(say, runs.train_watched, tmp_path, [1, 3], "timm", ONE_ROUND)
    alone = made[1][0]["batches"]
    assert [batch["route"] for batch in alone] == [0, 1, 2] * 2
    for number, whole in enumerate(alone):
        parts = [result["batches"][number] for result in made[3]]
        assert {part["route"] for part in parts} == {whole["route"]}
        assert {len(part["sums"]) for part in parts} == {4}
        assert all(sum(part["labels"]) * 2 == len(part["labels"]) for part in parts)
        assert sorted(value for part in parts for value in part["sums"]) == sorted(whole["sums"])


@pytest.mark.parametrize(
    ("norm_statistics", "private", "options"),
    [
        ("per_route", [], {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("shared", [], {}),
        pytest.param(
            "per_route", [], {"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.long
        ),
        ("per_route", ["*.bn?.*", "*.fc.*"], {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["accumulation", "shared", "compiled", "private"],
)
@pytest.mark.slow
def test_an_update_moves_its_ticket_alone_and_keeps_processes_in_step(
    say, tmp_path, norm_statistics, private, options
):
    options = {
        "model_options": {"norm_statistics": norm_statistics, "private_parameters": private},
        **options,
        **ONE_ROUND,
    }
    made = run_in_worlds(say, runs.train_watched, tmp_path, [2], "timm", options)[2]
    assert made[0]["moved_outside"] and not any(any(result["moved_outside"]) for result in made)
    for name, tensor in made[0]["state"].items():
        assert np.array_equal(tensor, made[1]["state"][name]), name
    assert made[0]["wrapped"]["find_unused"] is False
    assert made[0]["wrapped"]["broadcast"] == []
    updates = list(zip(made[0]["statistics"], made[1]["statistics"], strict=True))
    assert len(updates) == 6
    differed = 0
    for (before, after, others), (before_there, after_there, _) in updates:
        for here, there, mean, mean_there in zip(before, before_there, after, after_there, strict=True):
            differed += not np.array_equal(here, there)
            np.testing.assert_allclose(mean, (here.astype(float) + there) / 2, rtol=1e-5, atol=1e-7)
            assert np.array_equal(mean, mean_there)
        if norm_statistics == "per_route":
            assert all(others)
    assert differed  # else the mean shows nothing


@pytest.mark.slow
def test_mixed_precision_moves_its_ticket_alone(say, tmp_path):
    made = run_in_worlds(say, runs.train_watched, tmp_path, [2], "vit", {"bf16": True, **ONE_ROUND})[2]
    plain = launch(runs.train, str(tmp_path / "plain"), "vit", ONE_ROUND, world_size=1, logs=tmp_path / "logs")
    assert made[0]["moved_outside"] and not any(any(result["moved_outside"]) for result in made)
    for name, tensor in made[0]["state"].items():
        assert np.array_equal(tensor, made[1]["state"][name]), name
    assert made[0]["fingerprint"] != plain[0]["fingerprint"]  # extraction was in bfloat16 too


# Routers


@pytest.mark.parametrize("ticket_task", ["membership", "labels"])
@pytest.mark.slow
def test_routers_and_their_metrics_are_those_of_one_process(say, tmp_path, ticket_task):
    made = run_in_worlds(say, runs.fit_routers, tmp_path, [1, 2], ticket_task)
    (alone,) = made[1]
    assert all("eval_route_accuracy" in metrics for _, metrics in alone["routers"].values())
    for name, (tensors, metrics) in alone["routers"].items():
        for result in made[2]:
            there, metrics_there = result["routers"][name]
            assert metrics_there == pytest.approx(metrics, rel=1e-6, nan_ok=True)
            for key, tensor in tensors.items():
                np.testing.assert_allclose(there[key], tensor, rtol=1e-3, atol=1e-4)
                assert np.array_equal(there[key], made[2][0]["routers"][name][0][key])


def test_tickets_of_one_pass_are_the_same_for_any_number_of_processes(say, tmp_path):
    """Whole batches are dealt out, and their sums are added in the order of the batches: equal to the bit."""
    made = run_in_worlds(say, runs.find_in_one_pass, tmp_path, [1, 2])
    (alone,) = made[1]
    for result in made[2]:
        assert result["order"] == [0, 1, 2, 3, 4]
        assert result["masks"] == alone["masks"] and len(set(alone["masks"])) == 3
        assert all(np.array_equal(*pair) for pair in zip(result["rows"], alone["rows"], strict=True))
        assert not np.array_equal(result["rows"][0][0], result["rows"][0][1])


# A further route


@pytest.mark.slow
def test_an_added_route_is_the_same_for_any_number_of_processes(say, tmp_path):
    made = run_in_worlds(say, runs.add_route, tmp_path, [1, 2], "timm", {"max_steps": 2, **ONE_ROUND})
    alone = made[1][0]
    assert alone["report"]["added"] > 0 and list(alone["report"]["changed_decisions"]) == runs.ROUTES
    for result in made[2]:
        assert result["report"] == alone["report"]
        for name, tensor in result["state"].items():
            if name.startswith("router."):  # fitted on outputs of other batches
                np.testing.assert_allclose(tensor, alone["state"][name], rtol=1e-2, atol=1e-3)
            else:
                assert np.array_equal(tensor, alone["state"][name]), name
