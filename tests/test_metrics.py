"""Every metric against loops over samples, and against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as functional

from hf_rtl.metrics import (
    calibrate_thresholds,
    constant_tickets,
    label_metrics,
    membership_metrics,
    precision_at_recall,
    router_metrics,
)


NAMES = ["cat", "dog", "emu"]


def random_scores(seed, num_samples=60, num_routes=3, dtype=np.float32):
    generator = np.random.default_rng(seed)
    # Coarse scores, so that there are ties, and unequal prevalences.
    scores = (generator.integers(-8, 9, (num_samples, num_routes)) / 4).astype(dtype)
    home_routes = generator.choice(num_routes, num_samples, p=[0.6, 0.3, 0.1])
    scores[np.arange(num_samples), home_routes] += 0.5
    return scores, home_routes


def counts(scores, home_routes, route, threshold):
    true_positives = false_positives = false_negatives = true_negatives = 0
    for row, home in zip(scores, home_routes, strict=True):
        decided, is_home = float(row[route]) > threshold, home == route
        true_positives += decided and is_home
        false_positives += decided and not is_home
        false_negatives += not decided and is_home
        true_negatives += not decided and not is_home
    return true_positives, false_positives, false_negatives, true_negatives


def naive_decisions(scores, home_routes, route, threshold):
    tp, fp, fn, tn = counts(scores, home_routes, route, threshold)
    return {
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
    }


def naive_auroc(scores, home_routes, route):
    pairs = wins = 0
    for row, home in zip(scores, home_routes, strict=True):
        for other, other_home in zip(scores, home_routes, strict=True):
            if home == route and other_home != route:
                pairs += 1
                wins += 1 if row[route] > other[route] else 0.5 if row[route] == other[route] else 0
    return wins / pairs


def naive_precision_at_recall(scores, home_routes, route):
    best = 0.0
    for threshold in {float(row[route]) for row in scores}:
        accepted = [home == route for row, home in zip(scores, home_routes, strict=True) if row[route] >= threshold]
        if sum(accepted) >= 0.8 * sum(home == route for home in home_routes):
            best = max(best, sum(accepted) / len(accepted))
    return best


def naive_accuracy(scores, home_routes, thresholds):
    correct = 0
    for row, home in zip(scores, home_routes, strict=True):
        shifted = [float(score) - threshold for score, threshold in zip(row, thresholds, strict=True)]
        correct += shifted.index(max(shifted)) == home
    return correct / len(scores)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_membership_metrics_match_loops_over_samples(seed, dtype):
    scores, home_routes = random_scores(seed, dtype=dtype)
    thresholds = [0.25, -0.5, 1.0]
    metrics = membership_metrics(scores, home_routes, NAMES, thresholds=thresholds)
    expected = {}
    for prefix, shifts in (("", [0.0] * 3), ("calibrated_", thresholds)):
        rows = [naive_decisions(scores, home_routes, route, shifts[route]) for route in range(3)]
        for metric in rows[0]:
            for name, row in zip(NAMES, rows, strict=True):
                expected[f"{name}/{prefix}{metric}"] = row[metric]
            expected[f"{prefix}{metric}"] = sum(row[metric] for row in rows) / 3
        expected[f"worst_{prefix}balanced_accuracy"] = min(row["balanced_accuracy"] for row in rows)
        expected[f"{prefix}accuracy"] = naive_accuracy(scores, home_routes, shifts)
    aurocs = [naive_auroc(scores, home_routes, route) for route in range(3)]
    expected |= {f"{name}/auroc": auroc for name, auroc in zip(NAMES, aurocs, strict=True)}
    expected["auroc"] = sum(aurocs) / 3
    precisions = [naive_precision_at_recall(scores, home_routes, route) for route in range(3)]
    expected |= {f"{name}/precision_at_recall_80": value for name, value in zip(NAMES, precisions, strict=True)}
    expected["precision_at_recall_80"] = sum(precisions) / 3
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in metrics.values())
    plain = membership_metrics(scores, home_routes, NAMES)
    assert plain == {name: value for name, value in metrics.items() if "calibrated" not in name}


def test_membership_metrics_match_torchmetrics():
    scores, home_routes = random_scores(7, num_samples=200)
    metrics = membership_metrics(scores, home_routes, NAMES)
    for route, name in enumerate(NAMES):
        predicted = torch.from_numpy(scores[:, route])
        target = torch.from_numpy((home_routes == route).astype(np.int64))
        decided = (predicted > 0).long()
        specificity = functional.binary_specificity(decided, target).item()
        recall = functional.binary_recall(decided, target).item()
        expected = {
            "precision": functional.binary_precision(decided, target).item(),
            "recall": recall,
            "f1": functional.binary_f1_score(decided, target).item(),
            "balanced_accuracy": (recall + specificity) / 2,
            "auroc": functional.binary_auroc(predicted.sigmoid(), target).item(),
        }
        assert {metric: metrics[f"{name}/{metric}"] for metric in expected} == pytest.approx(expected, abs=1e-6)


def test_exact_metrics_at_natural_prevalence():
    # One of five samples is of route 0, whose ticket accepts it and another one. A score of 0 rejects.
    scores = np.array([[1.0, -1.0], [2.0, 3.0], [0.0, 1.0], [-1.0, 1.0], [-2.0, 0.0]])
    home_routes = np.array([0, 1, 1, 1, 1])
    metrics = membership_metrics(scores, home_routes, ["few", "many"])
    assert metrics["few/precision"] == 0.5
    assert metrics["few/recall"] == 1.0
    assert metrics["few/balanced_accuracy"] == 0.875
    assert metrics["few/auroc"] == 0.75
    assert metrics["many/recall"] == 0.75
    assert metrics["worst_balanced_accuracy"] == 0.875
    assert metrics["accuracy"] == 1.0


def test_a_route_without_samples_is_nan_and_left_out_of_the_means():
    scores = np.array([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]])
    metrics = membership_metrics(scores, np.array([0, 1, 1]), NAMES, thresholds=[0.0, 0.0, 0.0])
    for metric in ("balanced_accuracy", "precision", "recall", "f1", "auroc", "precision_at_recall_80"):
        assert math.isnan(metrics[f"emu/{metric}"])
        assert metrics[metric] == (metrics[f"cat/{metric}"] + metrics[f"dog/{metric}"]) / 2
    assert math.isnan(metrics["emu/calibrated_f1"])
    assert metrics["worst_balanced_accuracy"] == metrics["dog/balanced_accuracy"] == 0.25


def test_a_route_with_all_samples_and_one_that_accepts_none(recwarn):
    scores = np.array([[1.0, -1.0], [-1.0, -2.0]])
    metrics = membership_metrics(scores, np.array([0, 0]), ["all", "none"])
    assert (metrics["all/recall"], metrics["all/precision"]) == (0.5, 1.0)
    assert math.isnan(metrics["all/balanced_accuracy"]) and math.isnan(metrics["all/auroc"])
    assert math.isnan(metrics["balanced_accuracy"]) and math.isnan(metrics["worst_balanced_accuracy"])
    rejecting = membership_metrics(-np.abs(scores), np.array([0, 1]), ["all", "none"])
    assert rejecting["precision"] == rejecting["f1"] == 0.0
    assert rejecting["balanced_accuracy"] == 0.5
    assert not recwarn.list


@pytest.mark.parametrize("seed", range(3))
def test_router_metrics_match_loops_over_samples(seed):
    scores, route_ids = random_scores(seed)
    metrics = router_metrics(scores, route_ids, NAMES)
    precisions = [naive_precision_at_recall(scores, route_ids, route) for route in range(3)]
    expected = {"route_accuracy": naive_accuracy(scores, route_ids, [0.0] * 3)}
    expected["routed_precision_at_recall_80"] = sum(precisions) / 3
    for route, name in enumerate(NAMES):
        of_route = scores[route_ids == route], route_ids[route_ids == route]
        expected[f"{name}/route_recall"] = naive_accuracy(*of_route, [0.0] * 3)
        expected[f"{name}/routed_precision_at_recall_80"] = precisions[route]
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_router_metrics_of_a_route_without_samples():
    metrics = router_metrics(np.log([[0.6, 0.4], [0.7, 0.3]]), np.array([0, 0]), ["all", "none"])
    assert math.isnan(metrics["none/route_recall"]) and math.isnan(metrics["none/routed_precision_at_recall_80"])
    assert metrics["routed_precision_at_recall_80"] == metrics["route_accuracy"] == 1.0


def test_precision_at_recall_of_known_scores():
    scores, is_home = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False, True])
    assert precision_at_recall(scores, is_home) == 3 / 5  # recall .8 needs all three
    assert precision_at_recall(scores, is_home, recall=0.5) == 2 / 3
    assert precision_at_recall(scores, is_home, recall=0.3) == 1.0


def test_the_argmax_prefers_the_first_among_equals():
    metrics = membership_metrics(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([0, 1]), ["a", "b"])
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_calibrated_thresholds_reach_the_best_f1_of_all_cuts(seed, dtype):
    scores, home_routes = random_scores(seed, dtype=dtype)
    for route, threshold in enumerate(calibrate_thresholds(scores, home_routes)):
        assert type(threshold) is float and threshold == float(np.float32(threshold))
        values = sorted({float(score) for score in scores[:, route]})
        # All distinct decisions: a cut below everything, and one halfway between each pair of neighbours.
        cuts = [values[0] - 1] + [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
        reached = [naive_decisions(scores, home_routes, route, cut)["f1"] for cut in cuts]
        best = max(index for index, f1 in enumerate(reached) if f1 == max(reached))
        decided = [float(score) > threshold for score in scores[:, route]]
        assert decided == [float(score) > cuts[best] for score in scores[:, route]]
        if best > 0:
            assert threshold == cuts[best]


def test_thresholds_survive_being_stored_as_float32():
    scores = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    home_routes = np.arange(60) % 3
    for route, threshold in enumerate(calibrate_thresholds(scores, home_routes)):
        assert threshold == float(np.float32(threshold))
        lower, upper = (
            scores[scores[:, route] <= threshold, route].max(),
            scores[scores[:, route] > threshold, route].min(),
        )
        assert threshold == pytest.approx((float(lower) + float(upper)) / 2, rel=1e-6)


def test_calibration_by_hand():
    scores = np.array([[-5.0], [-3.0], [-2.0], [-1.0], [4.0]])
    # Accepting scores from -2 on finds 2 of 2 with one error: F1 .8. From 4 on, it finds 1 of 2 without error: F1 2/3.
    assert calibrate_thresholds(np.hstack([scores, -scores]), np.array([1, 1, 0, 1, 0]))[0] == -2.5
    # F1 is 2/3 from 3 on (1 of 2 without error) and from 0 on (2 of 2 with two errors). The higher cut wins.
    tied = np.array([[3.0], [2.0], [1.0], [0.0], [-1.0]])
    [threshold, _] = calibrate_thresholds(np.hstack([tied, tied]), np.array([0, 1, 1, 0, 1]))
    assert threshold == 2.5


def test_a_threshold_below_all_scores_still_accepts_them_in_float32():
    for dtype in (np.float32, np.float64):
        for value in (0.0, -7.25, 0.1, 1e-30, 1e30):
            scores = np.full((4, 1), value, dtype=dtype)
            [threshold] = calibrate_thresholds(scores, np.zeros(4, dtype=int))
            assert threshold < value
            assert np.float32(threshold) < value
            assert threshold == pytest.approx(value, rel=1e-6, abs=1e-40)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbouring_floats_are_told_apart(dtype):
    for value in (1.0, 0.1, -3.7, 1e30):
        lower = dtype(value)
        upper = np.nextafter(lower, dtype(np.inf))
        scores = np.array([[lower], [upper], [upper]], dtype=dtype)
        scores = np.hstack([scores, -scores])
        threshold = calibrate_thresholds(scores, np.array([1, 0, 0]))[0]
        assert (scores[:, 0].astype(np.float64) > threshold).tolist() == [False, True, True]


def test_constant_tickets():
    scores = np.array([[1.0, 2.0, 0.0], [1.0, 3.0, 0.0], [1.0, 2.0, 0.0]])
    assert constant_tickets(scores) == [0, 2]
    assert constant_tickets(scores[:, 1:2]) == []
    # Differences by rounding do not count, however small the scores; other small differences do.
    noise = np.array([[0, 0, 0], [1, 0, 1], [-1, 0, 0]])
    assert constant_tickets((scores * [0, 1, 1] + 8e-9 * noise).astype(np.float32)) == [0, 2]
    assert constant_tickets(1000 * scores + 4e-4 * noise) == [0]  # relative to the size of scores
    assert constant_tickets(scores + 4e-6 * noise) == []
    with pytest.raises(ValueError, match="at least 2"):
        constant_tickets(scores[:1])


def test_label_metrics_match_a_loop():
    generator = np.random.default_rng(3)
    logits = generator.integers(-3, 4, (50, 4)).astype(np.float32)
    labels, route_ids = generator.integers(0, 4, 50), generator.choice(4, 50, p=[0.6, 0.3, 0.1, 0.0])
    correct, total = [0] * 4, [0] * 4
    for row, label, route in zip(logits.tolist(), labels, route_ids, strict=True):
        correct[route] += row.index(max(row)) == label
        total[route] += 1
    metrics = label_metrics(logits, labels, route_ids, [*NAMES, "fox"])
    accuracies = [correct[route] / total[route] for route in range(3)]
    assert math.isnan(metrics.pop("fox/accuracy"))
    assert metrics == pytest.approx(
        {
            **{f"{name}/accuracy": accuracy for name, accuracy in zip(NAMES, accuracies, strict=True)},
            "accuracy": sum(correct) / 50,
            "mean_route_accuracy": sum(accuracies) / 3,
            "worst_route_accuracy": min(accuracies),
        }
    )
    assert metrics["accuracy"] != pytest.approx(metrics["mean_route_accuracy"])


SCORES = np.array([[1.0, -1.0], [-1.0, 1.0]])
HOMES = np.array([0, 1])


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (membership_metrics, (np.array([[1.0, np.nan], [0.0, 0.0]]), HOMES, ["a", "b"]), ValueError, "nan at .0, 1."),
        (membership_metrics, (SCORES * np.inf, HOMES, ["a", "b"]), ValueError, "inf at .0, 0.; .* finite"),
        (membership_metrics, (SCORES.astype(int), HOMES, ["a", "b"]), TypeError, "`scores` is a `int64` array"),
        (membership_metrics, (SCORES.tolist(), HOMES, ["a", "b"]), TypeError, "`scores` is a `list`"),
        (membership_metrics, (SCORES[0], HOMES, ["a", "b"]), ValueError, r"`scores` has shape \[2\]"),
        (membership_metrics, (SCORES, HOMES, ["a", "b", "c"]), ValueError, "2 columns and `route_names` 3"),
        (membership_metrics, (SCORES, HOMES, ["a", "a"]), ValueError, "`route_names` has 'a' more than once"),
        (membership_metrics, (SCORES, np.array([0, 2]), ["a", "b"]), ValueError, "goes from 0 to 2; allowed are"),
        (membership_metrics, (SCORES, np.array([0, -1]), ["a", "b"]), ValueError, "goes from -1 to 0"),
        (membership_metrics, (SCORES, np.array([0.0, 1.0]), ["a", "b"]), TypeError, "`home_routes`"),
        (membership_metrics, (SCORES, np.array([0, 1, 1]), ["a", "b"]), ValueError, r"`home_routes` has shape \[3\]"),
        (calibrate_thresholds, (SCORES, np.array([0, 0])), ValueError, "no sample of route 1"),
        (calibrate_thresholds, (SCORES * np.nan, HOMES), ValueError, "finite"),
        (constant_tickets, (SCORES * np.nan,), ValueError, "finite"),
        (label_metrics, (SCORES * np.nan, HOMES, HOMES, ["a", "b"]), ValueError, "`logits` has nan"),
        (label_metrics, (SCORES, np.array([0, 2]), HOMES, ["a", "b"]), ValueError, "`labels` goes from 0 to 2"),
        (label_metrics, (SCORES, HOMES, np.array([0, 2]), ["a", "b"]), ValueError, "`route_ids` has 2 at sample 1"),
        (label_metrics, (SCORES, HOMES, np.array([0]), ["a", "b"]), ValueError, "`route_ids` has 1 entries"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("thresholds", [[0.0], [0.0, float("nan")], 0.5])
def test_bad_thresholds(thresholds):
    with pytest.raises(ValueError, match="`thresholds` is"):
        membership_metrics(SCORES, HOMES, ["a", "b"], thresholds=thresholds)
