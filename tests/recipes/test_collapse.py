"""`recipes/collapse.py`: its counts on known trajectories, and the whole command on a small run."""

import json
import sys
from dataclasses import replace

import collapse
import numpy as np
import pytest
import torch
from collapse import Run, fall, false_alarms, planted, planted_rows, points_rows, route_rows, summary

from hf_rtl import MaskBank, RTLTrainer
from hf_rtl.analysis import Change, detect_collapse, ticket_similarity
from hf_rtl.pruning import prune
from shared.points import Point
from tests.training.small_runs import SMALL_NET


SPARSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
ROUTES = ["cat", "dog", "owl", "fox"]
SHAPES = [(40, 30), (1000,), (60, 40)]


def magnitude_run(alike=0.8):
    """Magnitude pruning of weights that share a part of their values, without a collapse."""
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [
        [alike * values + (1 - alike) * torch.randn(values.shape, generator=generator) for values in shared]
        for _ in ROUTES
    ]
    full = [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
    points = []
    for sparsity in SPARSITIES:
        num_kept = round((1 - sparsity) * 4600)
        masks = {name: prune(own, full, num_kept=num_kept) for name, own in zip(ROUTES, weights, strict=True)}
        bank = MaskBank.from_masks(["a.weight", "b.weight", "c.weight"], masks)
        points.append(Point(f"{sparsity}", bank, ticket_similarity(bank), {"metrics": {"eval_constant_tickets": 2.0}}))
    values = np.tile(np.linspace(0.9, 0.8, len(points))[:, None], len(ROUTES))
    values = values - 0.01 * np.arange(len(ROUTES))
    return Run("global", 0, points, values, detect_collapse([point.similarity for point in points]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.8] * 10, None),
        ([0.8] * 8 + [0.7, 0.7], 0.9),
        ([0.8] * 8 + [0.76, 0.74], 0.95),  # The first of these is too small for a fall.
        ([0.8] * 5 + [0.7, 0.8, 0.8, 0.7, 0.6], 0.9),  # A drop that recovers is no fall.
        ([0.8] * 5 + [0.7] * 4 + [0.8], None),
        ([0.9, 0.7, 0.8, 0.8, 0.8] + [0.7] * 5, 0.6),  # relative to the mean of mild sparsities, not to the best
        ([0.8, np.nan] * 4 + [np.nan, 0.7], 0.95),  # NaN: masks that were not retrained
    ],
)
def test_a_fall_is_one_that_stays(values, expected):
    assert fall(SPARSITIES, np.array(values)) == expected


def test_alarms_and_falls_are_counted_together():
    """Alarms before, at and after the fall, and each without the other, for two seeds."""
    run = magnitude_run()
    change = Change(point=7, sparsity=SPARSITIES[7], direction="up", before=0.0, expected=0.0, found=0.1)
    fallen = [0.8] * 8 + [0.6] * 2
    at_alarm, before, still = [0.8] * 7 + [0.6] * 3, [0.8] * 6 + [0.6] * 4, [0.8] * 10
    first = Run("global", 0, run.points, np.array([fallen, at_alarm, before, still]).T, dict.fromkeys(ROUTES, change))
    second = Run("global", 1, run.points, np.array([fallen, fallen, still, still]).T, {"dog": change})
    found = summary("global", [first, second])
    assert found == {
        "scope": "global",
        "tickets": 8,
        "alarms": 5,
        "median alarm at": "80.0%",
        "falls": 5,
        "median fall at": "90.0%",
        "alarm before fall": 2,
        "at the fall": 1,
        "after it": 1,
        "fall without alarm": 1,
        "alarm without fall": 1,
    }
    alarms, falls = route_rows(second)
    assert alarms == {
        "scope": "global",
        "seed": 1,
        "what": "alarm",
        **dict.fromkeys(ROUTES, "none"),
        "dog": "80.0% up",
    }
    assert [falls[name] for name in ROUTES] == ["90.0%", "90.0%", "none", "none"]


def test_points_are_shown_with_their_reports():
    run = magnitude_run()
    rows = points_rows(run)
    assert [row["sparsity"] for row in rows] == pytest.approx(SPARSITIES, abs=1e-3)
    for row, point, values in zip(rows, run.points, run.values, strict=True):
        assert row["similarity"] == pytest.approx(point.similarity.jaccard[np.triu_indices(4, 1)].mean())
        assert row["excess"] == pytest.approx(row["similarity"] - row["chance"])
        assert row["constant tickets"] == 2 and row["bal. acc."] == pytest.approx(values.mean())
        assert row["worst"] == values[3] < values[:3].min()
    run.points[3].report = None
    assert points_rows(run) == rows[:3] + rows[4:]


def test_alarms_on_meaningless_masks_are_counted(monkeypatch):
    run = magnitude_run()
    assert run.changes == {}
    rows = list(false_alarms(run, 3))
    assert [(row["masks"], row["runs with an alarm"], row["tickets"]) for row in rows] == [
        ("random", 0, 12),
        ("layer-shuffled", 0, 12),
    ]
    # Alarms of two tickets in each run are counted.
    seen = []
    monkeypatch.setattr(collapse, "detect_collapse", lambda points: seen.append(points) or {"cat": 1, "owl": 1})
    rows = list(false_alarms(run, 3))
    assert [(row["runs with an alarm"], row["tickets with an alarm"]) for row in rows] == [(3, 6), (3, 6)]
    # Masks differ between the tickets of a run and between runs.
    similarities = [points[4].jaccard[np.triu_indices(4, 1)] for points in seen]
    assert all(values.max() < 0.5 for values in similarities)
    assert len({tuple(values) for values in similarities}) == 6


@pytest.mark.parametrize("direction", ["up", "down"])
def test_planted_collapses_are_found_if_they_are_large(direction):
    run = magnitude_run()
    assert planted(run, direction, 1.0) == ["at once"] * 4
    assert planted(run, direction, 0.0) == [None] * 4
    short = replace(run, points=run.points[:5], values=run.values[:5])  # it does not reach 70 %
    expected = {"planted": direction, "of all positions": "100%", "tickets": 8, "found at once": 8}
    assert {**expected, "found later": 0, "alarm before": 0} in planted_rows([run, short, run])


def test_alarms_before_the_collapse_and_the_wrong_way_are_not_hits(monkeypatch):
    at = {"cat": (6, "up"), "dog": (6, "down"), "owl": (5, "up")}  # the collapse is planted at point 6
    changes = {name: Change(point, 0.7, way, before=0.0, expected=0.0, found=0.1) for name, (point, way) in at.items()}
    monkeypatch.setattr(collapse, "detect_collapse", lambda points: changes)
    assert planted(magnitude_run(), "up", 0.5) == ["at once", "later", "before", None]


def test_bad_arguments_end_the_command_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(RTLTrainer, "train", lambda self: pytest.fail("trained"))
    folder = str(tmp_path / "out")
    for arguments, said in (
        (["--target_sparsity", "0.6", "0.9"], "--target_sparsity starts at 0.6"),
        (["--target_sparsity", "0.5", "--class_similarity", str(tmp_path / "none.csv")], "none.csv"),
    ):
        monkeypatch.setattr(sys, "argv", ["collapse.py", "--num_channels", "1", "--output_dir", folder, *arguments])
        with pytest.raises((SystemExit, OSError, ValueError), match=said):
            collapse.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "groups.yaml").write_text("low: [0, 1, 2]\nmiddle: [3, 4, 5, 6]\nhigh: [7, 8, 9]\n")
    (tmp_path / "similarity.csv").write_text(",low,middle,high\nlow,1,.5,.1\nmiddle,.5,1,.5\nhigh,.1,.5,1\n")
    monkeypatch.chdir(tmp_path)
    arguments = [
        *(
            "--num_channels",
            "1",
            "--backbone",
            SMALL_NET,
            "--image_size",
            "16",
            "--route_groups",
            "groups.yaml",
            "--seeds",
            "5",
        ),
        *("--max_train_samples", "60", "--max_test_samples", "30", "--extraction_steps", "1", "--max_steps", "1"),
        *("--route_batch_size", "4", "--target_sparsity", "0.3", "0.5", "0.7", "--prune_amount", "0.6"),
        *("--scopes", "layer", "--num_random_runs", "1"),
        *("--class_similarity", str(tmp_path / "similarity.csv")),
        *("--seed_transforms", "false", "--save_strategy", "no", "--learning_rate", "0.01"),
    ]
    monkeypatch.setattr(sys, "argv", ["collapse.py", "--output_dir", "out", *arguments])
    collapse.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [line["sparsity"] for line in results["figures"]] == pytest.approx([0.3, 0.5, 0.7], abs=1e-3)
    assert [(line["scope"], line["seed"], line["what"]) for line in results["routes"]] == [
        ("layer", 5, what) for what in ("alarm", "fall")
    ]
    assert len(results["planted"]) == 8 and len(results["false_alarms"]) == 2
    assert results["collapse"]["class_similarity"] == "similarity.csv"
    assert {"all", "shallow", "middle", "deep"} < set(results["alignment"][0])
    assert '"prune_scope": "layer"' in (tmp_path / "out" / "layer-seed-5" / "run.json").read_text()
    assert "layer-seed-5-curves.png" in results["pictures"]
    assert all((tmp_path / "out" / picture).exists() for picture in results["pictures"])
    assert "planted" in printed and "70%" in printed
