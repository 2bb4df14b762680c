"""The statistics that put tickets beside their rivals, and the sentence at their end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shared.one_pass import DENSE, ONE, ONE_REFIT, OTHER, RANDOM, TICKETS, TICKETS_REFIT, UNION
from shared.report import table
from shared.verdict import AHEAD, BEHIND, UNDECIDED, Comparison, Configuration, Figures, lead_of


PER_ROUTE, LORA = "a model per route", "LoRA per route"
BUDGETS = ["time", "bytes"]
# Five values, one a seed, around a mean of zero, with a sample standard deviation of 0.01.
NOISE = [value * 0.01 / math.sqrt(2.5) for value in (-2, -1, 0, 1, 2)]


def at(
    method: str, qualities: Sequence[float], sparsity: float = 0.5, ms: float = 10.0, size: int = 1000
) -> list[Figures]:
    """Figures of a method with a mean quality for each seed. Its routes are up to 0.1 away."""
    return [
        Figures(seed, method, sparsity, {"de": mean - 0.1, "en": mean, "fi": mean + 0.1}, ms, size)
        for seed, mean in enumerate(qualities)
    ]


def around(mean: float) -> list[float]:
    return [mean + noise for noise in NOISE]


def test_an_interval_is_that_of_a_table_of_students_t() -> None:
    lead = lead_of([1.0, 2.0, 3.0])
    # Mean 2, deviation 1; 4.302653 for two degrees of freedom, divided by √3.
    assert (lead.mean, lead.deviation, lead.num_seeds) == (2, 1, 3)
    assert lead.interval == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # With two degrees of freedom, quantile p is (2p - 1) / √(2p(1 - p)): 6.205347 at 1 - 0.025 / 2.
    assert lead_of([1.0, 2.0, 3.0], num_rivals=2).interval == pytest.approx((2 - 2.484138, 2 + 3.582659), abs=1e-6)


def test_tickets_with_a_refit_stand_against_rivals_with_one() -> None:
    figures = [*at(TICKETS, around(0.6)), *at(ONE, around(0.5)), *at(ONE_REFIT, around(0.7))]
    assert Comparison(figures).verdict("time").kind == BEHIND
    comparison = Comparison([*figures, *at(TICKETS_REFIT, around(0.8), size=3000)])
    for budget in BUDGETS:
        verdict = comparison.verdict(budget)
        assert (verdict.kind, verdict.rival) == (AHEAD, Configuration(ONE_REFIT, 0.5))
    assert comparison.difference_rows()[0]["method"] == f"{TICKETS_REFIT} over {TICKETS}"
    assert {line["method"] for line in comparison.verdict_rows()} == {TICKETS_REFIT}


@pytest.mark.parametrize("less_is_better", [False, True])
def test_paired_differences_are_those_of_plain_loops(less_is_better: bool) -> None:
    generator = np.random.default_rng(0)
    figures = [
        Figures(seed, method, 0.5, dict(zip("abcd", generator.random(4).tolist(), strict=True)), 1, 1)
        for method in (TICKETS, ONE, RANDOM)
        for seed in (7, 3, 5)
    ]
    comparison = Comparison([figures[place] for place in generator.permutation(len(figures))], "loss", less_is_better)
    found = {(run.seed, run.method): run for run in figures}
    for rival in (ONE, RANDOM):
        means, worsts = [], []
        for seed in (3, 5, 7):
            sums, worst = [], []
            for method in (TICKETS, rival):
                values = list(found[seed, method].quality.values())
                total, least, most = 0.0, math.inf, -math.inf
                for value in values:
                    total, least, most = total + value, min(least, value), max(most, value)
                sums.append(total / len(values))
                worst.append(most if less_is_better else least)
            means.append(sums[1] - sums[0] if less_is_better else sums[0] - sums[1])
            worsts.append(worst[1] - worst[0] if less_is_better else worst[0] - worst[1])
        leads = comparison.paired(0.5, Configuration(rival, 0.5))
        assert list(leads) == ["loss", "worst loss"]
        for lead, differences in zip(leads.values(), (means, worsts), strict=True):
            center = sum(differences) / 3
            deviation = math.sqrt(sum((value - center) ** 2 for value in differences) / 2)
            half = 4.30265273 * deviation / math.sqrt(3)
            assert lead.interval is not None
            assert [lead.mean, lead.deviation, *lead.interval] == pytest.approx(
                [center, deviation, center - half, center + half], abs=1e-7
            )


@pytest.mark.parametrize("less_is_better", [False, True])
@pytest.mark.parametrize("better, kind", [(0.02, AHEAD), (-0.02, BEHIND), (0.01, UNDECIDED), (-0.01, UNDECIDED)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_planted_leads_are_found(budget: str, better: float, kind: str, less_is_better: bool) -> None:
    # The interval reaches 2.776 * 0.01 / √5 = 0.0124 from the mean.
    sign = -1 if less_is_better else 1
    # This rival is beyond the budget.
    dear = {"ms": 20} if budget == "time" else {"size": 2000}
    figures = [*at(TICKETS, around(0.7 + sign * better)), *at(ONE, [0.7] * 5), *at(DENSE, [0.7 + sign] * 5, 0, **dear)]
    verdict = Comparison(figures, less_is_better=less_is_better).verdict(budget)
    assert (verdict.kind, verdict.worst_kind, verdict.rival) == (kind, kind, (ONE, 0.5))
    assert verdict.leads["accuracy"].mean == pytest.approx(better)


def test_time_and_bytes_have_their_own_rivals() -> None:
    figures = [
        *at(TICKETS, around(0.70)),
        *at(ONE, [0.65] * 5),
        *at(PER_ROUTE, [0.80] * 5, size=3000),
        *at(UNION, [0.70] * 5, ms=14),
        *at(DENSE, [0.90] * 5, 0.0, ms=20, size=2000),
    ]
    comparison = Comparison(figures)
    assert comparison.verdict("time").sentence == (
        "At equal time, tickets at 50 % are behind a model per route at 50 % (the strongest of 2 rivals) by 0.100 "
        "accuracy (95 % interval 0.084 to 0.112, 5 seeds); their worst route is behind by 0.100 accuracy "
        "(95 % interval 0.084 to 0.112, 5 seeds)."
    )
    assert comparison.verdict("bytes").sentence == (
        "At equal bytes, it is not decided whether tickets at 50 % are ahead of one mask at the union's density at "
        "50 % (the strongest of 2 rivals): the lead is 0.000 accuracy (95 % interval −0.012 to 0.016, 5 seeds); their "
        "worst route is not decided: the lead is 0.000 accuracy (95 % interval −0.012 to 0.016, 5 seeds)."
    )
    smaller = Comparison([run for run in figures if run.method != UNION], "bits per byte").verdict("bytes")
    assert smaller.sentence == (
        "At equal bytes, tickets at 50 % are ahead of one mask at 50 % (the only rival) by 0.050 bits per byte (95 % "
        "interval 0.038 to 0.062, 5 seeds); their worst route is ahead by 0.050 bits per byte (95 % interval 0.038 to "
        "0.062, 5 seeds)."
    )


@pytest.mark.parametrize("less_is_better", [False, True])
def test_the_worst_route_has_its_own_verdict(less_is_better: bool) -> None:
    sign = -1 if less_is_better else 1
    # The worst route is not the same one for both, and not the first.
    own = [
        Figures(seed, TICKETS, 0.5, {"de": sign * (9 + noise), "en": sign * 2.0}, 1, 1)
        for seed, noise in enumerate(NOISE)
    ]
    rival = [Figures(seed, ONE, 0.5, {"de": sign * 3.0, "en": sign * 5.0}, 1, 1) for seed in range(5)]
    verdict = Comparison([*own, *rival], less_is_better=less_is_better).verdict("time")
    assert (verdict.kind, verdict.worst_kind) == (AHEAD, BEHIND)
    assert [lead.mean for lead in verdict.leads.values()] == pytest.approx([1.5, -1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_rival_may_cost_five_percent_more(budget: str) -> None:
    def costing(runs: list[Figures], costs: Sequence[int]) -> list[Figures]:
        pairs = zip(runs, costs, strict=True)
        return [replace(run, ms=cost) if budget == "time" else replace(run, stored_bytes=cost) for run, cost in pairs]

    cheap = [*costing(at(TICKETS, around(0.7)), [100] * 5), *costing(at(ONE, [0.6] * 5), [1] * 5)]
    # Means over seeds count: 105 and 105.2.
    for costs, kind in (([103, 104, 105, 106, 107], BEHIND), ([103, 104, 105, 106, 108], AHEAD)):
        assert Comparison([*cheap, *costing(at(LORA, [0.8] * 5), costs)]).verdict(budget).kind == kind


def test_rivals_are_all_methods_at_all_sparsities_but_no_controls() -> None:
    figures = [
        *at(TICKETS, around(0.7), 0.5),
        *at(TICKETS, [0.99] * 5, 0.7, ms=5),
        *at(RANDOM, [0.98] * 5),
        *at(OTHER, [0.97] * 5),
        *at(ONE, [0.6] * 5),
        *at(ONE, [0.8] * 5, 0.7, ms=5),
    ]
    verdict = Comparison(figures).verdict("time", 0.5)
    assert (verdict.kind, verdict.rival) == (BEHIND, (ONE, 0.7))
    assert "one mask at 70 % (the strongest of 2 rivals)" in verdict.sentence
    assert Comparison(figures).verdict("time", 0.7).rival == (ONE, 0.7)


@pytest.mark.parametrize("budget, word", [("time", "fast"), ("bytes", "small")])
def test_without_a_rival_as_cheap_nothing_is_decided(budget: str, word: str) -> None:
    figures = [*at(TICKETS, around(0.9)), *at(RANDOM, [0.1] * 5), *at(ONE, [0.1] * 5, ms=20, size=2000)]
    verdict = Comparison(figures).verdict(budget)
    assert verdict.sentence == f"At equal {budget}, it is not decided: no rival is as {word} as tickets at 50 %."
    assert (verdict.kind, verdict.worst_kind, verdict.rival, verdict.leads) == (UNDECIDED, UNDECIDED, None, {})


def test_the_sentence_is_about_the_middle_sparsity() -> None:
    # That with the best tickets is another one.
    figures = [run for sparsity in (0.7, 0.3, 0.5) for run in at(TICKETS, around(1 - sparsity), sparsity)]
    figures += at(ONE, [0.4] * 5)
    assert "tickets at 50 % are ahead" in Comparison(figures).verdict("time").sentence
    two = Comparison([run for run in figures if run.sparsity != 0.3])
    assert "tickets at 70 % are behind" in two.verdict("time").sentence
    assert "tickets at 30 %" in Comparison(figures).verdict("time", 0.3).sentence


def test_one_seed_decides_nothing() -> None:
    comparison = Comparison([*at(TICKETS, [0.9]), *at(ONE, [0.1])])
    verdict = comparison.verdict("time")
    assert verdict.sentence == (
        "At equal time, it is not decided whether tickets at 50 % are ahead of one mask at 50 % (the only rival): the "
        "lead is 0.800 accuracy (one seed, so no interval); their worst route is not decided: the lead is 0.800 "
        "accuracy (one seed, so no interval)."
    )
    assert all(lead.interval is lead.deviation is None for lead in verdict.leads.values())
    assert comparison.difference_rows()[0]["lead in accuracy"] == "0.800"


def test_ties_go_to_the_cheaper_rival_and_are_not_decided() -> None:
    figures = [*at(TICKETS, [0.1, 0.2, 0.3]), *at(PER_ROUTE, [0.1, 0.2, 0.3], ms=9), *at(ONE, [0.1, 0.2, 0.3], ms=8)]
    # The sum of floats depends on their order, a mean over routes does not.
    figures = [
        replace(run, quality={name: run.quality[name] for name in order})
        for run, order in zip(figures, [("de", "en", "fi"), ("fi", "en", "de"), ("en", "fi", "de")] * 3, strict=True)
    ]
    for order in (figures, figures[::-1]):
        verdict = Comparison(order).verdict("time")
        assert (verdict.kind, verdict.worst_kind, verdict.rival) == (UNDECIDED, UNDECIDED, (ONE, 0.5))
        assert [lead.interval for lead in verdict.leads.values()] == [(0, 0), (0, 0)]
    # No seed differs from another.
    assert Comparison([*at(TICKETS, [0.7] * 3), *at(ONE, [0.7] * 3)]).verdict("bytes").kind == UNDECIDED


def test_a_choice_among_several_rivals_needs_a_larger_lead_and_the_sentence_says_so() -> None:
    # Alone, the interval of the rival reaches 2.776 * 0.01 / √5 = 0.0124; chosen of four, 4.315 * 0.01 / √5 = 0.0193.
    tickets = at(TICKETS, around(0.685))
    rivals = [
        at(method, [quality] * 5) for method, quality in ((ONE, 0.7), (LORA, 0.6), (UNION, 0.6), (PER_ROUTE, 0.5))
    ]
    alone = Comparison([*tickets, *rivals[0]]).verdict("time")
    chosen = Comparison([*tickets, *sum(rivals, [])]).verdict("time")
    assert (alone.kind, chosen.kind, chosen.rival) == (BEHIND, UNDECIDED, alone.rival)
    assert (
        "(the strongest of 4 rivals): the lead is −0.015 accuracy (95 % interval −0.027 to 0.004, 5 seeds); with this "
        "rival alone, they would be behind; their worst route is not decided" in chosen.sentence
    )
    assert "with this rival alone" not in alone.sentence
    # Who is ahead of the strongest of several had no choice: the lower limit stays.
    ahead = [
        Comparison([*at(TICKETS, around(0.715)), *figures]).verdict("time") for figures in (rivals[0], sum(rivals, []))
    ]
    assert [verdict.kind for verdict in ahead] == [AHEAD, AHEAD]
    lower = [interval[0] for verdict in ahead if (interval := verdict.leads["accuracy"].interval)]
    assert lower[0] == lower[1]


@pytest.mark.slow
@pytest.mark.parametrize("num_rivals, shared", [(1, 1.0), (6, 0.0)])
def test_without_a_true_difference_a_verdict_is_rare(num_rivals: int, shared: float) -> None:
    """
    In 400 comparisons, each of the two verdicts may come in 2.5 %. Its number is then binomial: the share has a
    standard deviation of √(0.025 * 0.975 / 400) = 0.8 %; that of both together, of √(0.05 * 0.95 / 400) = 1.1 %. Three
    of these are the margins: 4.9 % and 8.3 %. `shared` noise of all methods of a seed falls out of paired differences.
    """
    generator = np.random.default_rng(0)
    methods = [TICKETS, *(f"rival {number}" for number in range(num_rivals))]
    kinds, alone = [], []
    for _ in range(400):
        noise = generator.normal(size=(5, 1 + num_rivals)) + shared * generator.normal(size=(5, 1))
        comparison = Comparison(
            [
                Figures(seed, method, 0.5, {"de": quality}, 1.0, 1)
                for seed, of_seed in enumerate(noise.tolist())
                for method, quality in zip(methods, of_seed, strict=True)
            ]
        )
        verdict = comparison.verdict("time")
        assert verdict.rival is not None
        kinds.append(verdict.kind)
        alone.append(comparison.paired(0.5, verdict.rival)["accuracy"].kind)
    ahead, behind = kinds.count(AHEAD) / 400, kinds.count(BEHIND) / 400
    assert max(ahead, behind) <= 0.049 and ahead + behind <= 0.083
    if num_rivals == 1:
        # As many as promised, neither of them always or never.
        assert ahead + behind >= 0.017
    else:
        # Without the correction, tickets would be behind too often.
        assert alone.count(BEHIND) / 400 > 0.049


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["fi", "ms", "stored_bytes"])
def test_figures_that_are_not_finite_are_refused(name: str, value: float) -> None:
    runs = at(ONE, [0.5] * 3)
    broken = {"quality": {**runs[1].quality, "fi": value}} if name == "fi" else {name: value}
    runs[1] = replace(runs[1], **broken)
    with pytest.raises(
        ValueError, match=f"^one mask at 50 %, seed 1: '{name}' is {value}; give finite numbers only.$"
    ):
        Comparison([*at(TICKETS, [0.5] * 3), *runs])


def test_seeds_and_routes_that_differ_between_methods_are_refused() -> None:
    tickets, rival = at(TICKETS, [0.5] * 3), at(ONE, [0.5] * 3)
    for wrong in (rival[:2], [*rival, replace(rival[0], seed=3)], [*rival[:2], replace(rival[2], seed=3)]):
        with pytest.raises(
            ValueError, match=r"^one mask at 50 % has seeds and routes \[\(0, 'de', 'en', 'fi'\), \(1, "
        ):
            Comparison([*tickets, *wrong])
    with pytest.raises(ValueError, match="one mask .* give each seed once to all"):
        Comparison([*tickets, *rival[:2], replace(rival[2], quality={"de": 0.5})])
    # One seed that counts twice would narrow the interval.
    with pytest.raises(ValueError, match="give each seed once to all"):
        Comparison([*tickets, tickets[0], *rival, rival[0]])


def test_tables_show_every_method_every_difference_and_every_verdict() -> None:
    figures = [
        *at(DENSE, [0.9, 0.9, 0.9], 0.0, ms=20, size=2000),
        *at(TICKETS, [0.7, 0.8, 0.9]),
        *at(TICKETS, [0.5, 0.6, 0.7], 0.7, ms=5, size=500),
        *at(ONE, [0.7, 0.7, 0.7], ms=9.5),
        *at(RANDOM, [0.1, 0.2, 0.3], 0.7, ms=5, size=500),
    ]
    figures[3] = replace(figures[3], ms=8.0)
    comparison = Comparison(figures)
    lines = comparison.method_rows()
    assert [(line["method"], line["sparsity"]) for line in lines] == [
        (DENSE, 0),
        (TICKETS, 0.5),
        (ONE, 0.5),
        (TICKETS, 0.7),
        (RANDOM, 0.7),
    ]
    assert lines[1] == {
        "method": TICKETS,
        "sparsity": 0.5,
        "accuracy": "0.800 ± 0.100",
        "worst accuracy": "0.700 ± 0.100",
        "ms": "9.333 ± 1.155",
        # The seeds have 20 / 8, 20 / 10 and 20 / 10.
        "times as fast": "2.167 ± 0.289",
        "stored bytes": 1000,
    }
    differences = comparison.difference_rows()
    assert [(line["method"], line["sparsity"]) for line in differences] == [
        ("tickets over dense", 0.5),
        ("tickets over one mask", 0.5),
        ("tickets over dense", 0.7),
        ("tickets over random tickets", 0.7),
    ]
    # 4.302653 * 0.1 / √3 = 0.248.
    assert differences[0]["lead in accuracy"] == "−0.100 ± 0.100 (−0.348 to 0.148)"
    assert differences[3]["lead in worst accuracy"].startswith("0.400 ± 0.000")
    verdicts = comparison.verdict_rows()
    assert [(line["at equal"], line["sparsity"], line["rival"], line["verdict"]) for line in verdicts] == [
        ("time", 0.5, "one mask at 50 %", UNDECIDED),
        ("time", 0.7, "none", UNDECIDED),
        ("bytes", 0.5, "one mask at 50 %", UNDECIDED),
        ("bytes", 0.7, "none", UNDECIDED),
    ]
    assert verdicts[0]["lead in accuracy"] == "0.100 ± 0.100 (−0.148 to 0.348)"
    for rows in (lines, differences, verdicts):
        assert json.loads(json.dumps(rows)) == rows
        assert len(table(rows).splitlines()) == 2 + len(rows)


def test_without_dense_no_speed_is_relative() -> None:
    assert Comparison(at(TICKETS, [0.5, 0.6])).method_rows()[0]["times as fast"] is None


def test_qualities_below_zero_keep_their_sign() -> None:
    # Such as decibels.
    rows = Comparison(at(TICKETS, [-3.0, -3.0]), "dB", less_is_better=True).method_rows()
    assert (rows[0]["dB"], rows[0]["worst dB"]) == ("-3.000 ± 0.000", "-2.900 ± 0.000")


def test_what_is_rounded_to_zero_has_no_sign() -> None:
    figures = [*at(TICKETS, [0.4999, 0.4998]), *at(ONE, [0.5, 0.5])]
    assert Comparison(figures).difference_rows()[0]["lead in accuracy"] == "0.000 ± 0.000 (−0.001 to 0.000)"
