"""
Are tickets ahead of their rivals at equal time, and at equal bytes? Leads over seeds, their tables, and a sentence.

A lead is a paired difference: the quality of tickets less that of another method with the same seed. It is above zero
where tickets are better, also where less is better, as of bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import sub
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from .one_pass import DENSE, OTHER, RANDOM, TICKETS, TICKETS_REFIT, middle
from .report import over_seeds
from .round_methods import SHUFFLED


AHEAD, BEHIND, UNDECIDED = "ahead", "behind", "not decided"
CLAIMS = {AHEAD: "{} are ahead of", BEHIND: "{} are behind", UNDECIDED: "it is not decided whether {} are ahead of"}
# What is equal -> its name in `Figures`, and what a rival must be.
# What nobody would serve.
CONTROLS = (RANDOM, SHUFFLED, OTHER)
BUDGETS = {"time": ("ms", "fast"), "bytes": ("stored_bytes", "small")}


@dataclass
class Figures:
    """
    What a method has reached with a seed.

    Args:
        seed (`int`): the seed.
        method (`str`): its name; tickets, dense and the controls have those of `one_pass`.
        sparsity (`float`): the one that was asked for, so that it is the same for all seeds; 0 is not pruned.
        quality (`Mapping[str, float]`): the quality of every route.
        ms (`float`): milliseconds of a call.
        stored_bytes (`int`): the bytes of all that is stored for all routes.
    """

    seed: int
    method: str
    sparsity: float
    quality: Mapping[str, float]
    ms: float
    stored_bytes: int


class Configuration(NamedTuple):
    """A method at a sparsity."""

    method: str
    sparsity: float

    def __str__(self) -> str:
        return f"{self.method} at {100 * self.sparsity:.3g} %" if self.sparsity else self.method


class Lead(NamedTuple):
    """A lead over seeds; see `lead_of`. With one seed there is neither a standard deviation nor an interval."""

    mean: float
    deviation: float | None
    interval: tuple[float, float] | None
    num_seeds: int

    @property
    def kind(self) -> str:
        """Ahead or behind if the interval excludes zero."""
        low, high = self.interval or (0, 0)
        return AHEAD if low > 0 else BEHIND if high < 0 else UNDECIDED

    def cell(self) -> str:
        """As in tables: the mean ± the standard deviation (the interval)."""
        spread = f" ± {self.deviation:.3f} ({' to '.join(map(_number, self.interval))})" if self.interval else ""
        return _number(self.mean) + spread

    def clause(self, unit: str) -> str:
        """What follows the kind in a sentence. What tickets are behind by is the lead of the rival."""
        sign, start = (-1 if self.kind == BEHIND else 1), (": the lead is" if self.kind == UNDECIDED else " by")
        limits = " to ".join(_number(limit) for limit in sorted(sign * limit for limit in self.interval or ()))
        inside = f"95 % interval {limits}, {self.num_seeds} seeds" if limits else "one seed, so no interval"
        return f"{start} {_number(sign * self.mean)} {unit} ({inside})"


def lead_of(differences: Sequence[float], num_rivals: int = 1) -> Lead:
    """
    The mean of paired differences, their sample standard deviation, and the 95 % interval from Student's t.

    The strongest of several rivals is chosen when qualities are known. Luck helps to be chosen, so that the lead over
    it comes out too small, not too large. Therefore the upper limit, which decides whether tickets are behind, is
    corrected by Bonferroni: it is at 1 - 0.025 / `num_rivals` in place of 0.975. The lower limit, which decides
    whether they are ahead, needs no correction. Where all are equally good, each of the two wrong verdicts comes once
    in forty comparisons or less. The price: with many rivals and few seeds, tickets are seldom behind. The sentence
    says where the correction alone prevents it.
    """
    center, number = mean(differences), len(differences)
    if number == 1:
        return Lead(center, None, None, number)
    deviation = stdev(differences)
    below, above = t.ppf((0.975, 1 - 0.025 / num_rivals), number - 1) * deviation / math.sqrt(number)
    return Lead(center, deviation, (float(center - below), float(center + above)), number)


class Verdict(NamedTuple):
    """
    Tickets beside the strongest rival of a class.

    Args:
        sentence (`str`): says it all.
        kind (`str`): `"ahead"`, `"behind"` or `"not decided"`, by the mean over routes.
        worst_kind (`str`): the same by the worst route.
        rival (`Configuration`, *optional*): the strongest rival, if any is as cheap as tickets.
        leads (`Mapping[str, Lead]`): the leads over that rival, as of `Comparison.paired`; none without a rival.
    """

    sentence: str
    kind: str = UNDECIDED
    worst_kind: str = UNDECIDED
    rival: Configuration | None = None
    leads: Mapping[str, Lead] = {}


@dataclass
class Comparison:
    """
    Tickets beside other methods on the same data.

    Args:
        figures (`Sequence[Figures]`): those of every seed, method and sparsity; those of dense at sparsity 0.
        unit (`str`, defaults to `"accuracy"`): what the quality is, for sentences and titles.
        less_is_better (`bool`, defaults to `False`): whether less quality is better.

    Raises:
        ValueError: seeds or routes differ between methods, a seed comes twice, or a figure is not finite.
    """

    figures: Sequence[Figures]
    unit: str = "accuracy"
    less_is_better: bool = False

    def __post_init__(self) -> None:
        shapes = {at: [(run.seed, *sorted(run.quality)) for run in runs] for at, runs in self.runs.items()}
        first, expected = next(iter(shapes.items()))
        for at, found in shapes.items():
            if found != expected or len(set(found)) < len(found):
                raise ValueError(f"{at} has seeds and routes {found}, {first} {expected}; give each seed once to all.")
        for at, run in ((at, run) for at, runs in self.runs.items() for run in runs):
            for name, value in {**run.quality, "ms": run.ms, "stored_bytes": run.stored_bytes}.items():
                if not math.isfinite(value):
                    raise ValueError(f"{at}, seed {run.seed}: {name!r} is {value}; give finite numbers only.")

    @cached_property
    def runs(self) -> dict[Configuration, list[Figures]]:
        """The figures of every method and sparsity, by ascending sparsity; those of each by ascending seed."""
        ordered = sorted(self.figures, key=lambda run: (run.sparsity, run.seed))
        configurations = dict.fromkeys(Configuration(run.method, run.sparsity) for run in ordered)
        return {at: [run for run in ordered if (run.method, run.sparsity) == at] for at in configurations}

    @cached_property
    def own(self) -> str:
        """The tickets whose lead is asked for: where some have a refit, these, since rivals may have one too."""
        return TICKETS_REFIT if any(run.method == TICKETS_REFIT for run in self.figures) else TICKETS

    @property
    def sparsities(self) -> list[float]:
        """Those of the tickets, ascending."""
        return [at.sparsity for at in self.runs if at.method == self.own]

    def qualities(self, at: Configuration) -> dict[str, list[float]]:
        """The mean over routes and the worst route, by title, of every seed."""
        worst = max if self.less_is_better else min
        of_seeds = [run.quality.values() for run in self.runs[at]]
        return {self.unit: list(map(mean, of_seeds)), f"worst {self.unit}": list(map(worst, of_seeds))}

    def paired(self, sparsity: float, rival: Configuration, num_rivals: int = 1) -> dict[str, Lead]:
        """
        Two leads of tickets at `sparsity` over a rival, by title: of the mean over routes, and of the worst route,
        which every method has for itself in every seed. For `num_rivals` see `lead_of`.
        """
        pair = self.qualities(Configuration(self.own, sparsity)), self.qualities(rival)
        better, worse = reversed(pair) if self.less_is_better else pair
        return {title: lead_of([*map(sub, better[title], worse[title])], num_rivals) for title in better}

    def verdict(self, budget: str, sparsity: float | None = None) -> Verdict:
        """
        Tickets at one sparsity beside the strongest rival that costs at most as much.

        Up to 5 % more are as much, since two measurements of one network differ too. Rivals are all methods at all
        sparsities: who can afford tickets can afford each of these, and would take the best. Only controls are none,
        which nobody would serve, and tickets of another kind. The strongest rival has the best mean quality over
        seeds and routes; among equals, it is the cheapest. Tickets have no such choice, which favours rivals. The
        worst route is compared with that of the same rival. For the correction for the choice see `lead_of`.

        Args:
            budget (`str`): `"time"` for milliseconds of a call, `"bytes"` for stored bytes; means over seeds count.
            sparsity (`float`, *optional*): that of the tickets. By default it is the middle one (of two in the middle,
                the higher): one chosen by quality would flatter tickets.
        """
        own = Configuration(self.own, middle(self.sparsities) if sparsity is None else sparsity)
        figure, adjective = BUDGETS[budget]
        costs = {at: mean(getattr(run, figure) for run in runs) for at, runs in self.runs.items()}
        no_rivals = (TICKETS, TICKETS_REFIT, *CONTROLS)
        rivals = [at for at in costs if at.method not in no_rivals and costs[at] <= 1.05 * costs[own]]
        if not rivals:
            return Verdict(f"At equal {budget}, it is not decided: no rival is as {adjective} as {own}.")
        alone = {at: self.paired(own.sparsity, at)[self.unit] for at in rivals}
        rival = min(rivals, key=lambda at: (alone[at].mean, costs[at]))
        leads = self.paired(own.sparsity, rival, len(rivals))
        lead, worst = leads.values()
        among = f"the strongest of {len(rivals)} rivals" if len(rivals) > 1 else "the only rival"
        note = "; with this rival alone, they would be behind" * (alone[rival].kind != lead.kind)
        claim = f"At equal {budget}, {CLAIMS[lead.kind].format(own)} {rival} ({among}){lead.clause(self.unit)}{note}"
        worst_claim = f"their worst route is {worst.kind}{worst.clause(self.unit)}"
        return Verdict(f"{claim}; {worst_claim}.", lead.kind, worst.kind, rival, leads)

    def method_rows(self) -> list[dict[str, Any]]:
        """The lines of every method and sparsity: means and spreads over seeds."""
        num_seeds = len(next(iter(self.runs.values())))
        return over_seeds([[self.line(at, place) for at in self.runs] for place in range(num_seeds)])

    def line(self, at: Configuration, place: int) -> dict[str, Any]:
        run, dense = self.runs[at][place], self.runs.get(Configuration(DENSE, 0))
        quality = {title: of_seeds[place] for title, of_seeds in self.qualities(at).items()}
        faster = dense[place].ms / run.ms if dense else None
        return {**at._asdict(), **quality, "ms": run.ms, "times as fast": faster, "stored bytes": run.stored_bytes}

    def difference_rows(self) -> list[dict[str, Any]]:
        """Leads over every method that is as sparse or not pruned, controls too; without correction for a choice."""
        return [
            {"method": f"{self.own} over {at.method}", "sparsity": own, **_cells(self.paired(own, at))}
            for own, at in product(self.sparsities, self.runs)
            if at.method != self.own and at.sparsity in (own, 0)
        ]

    def verdict_rows(self) -> list[dict[str, Any]]:
        """The verdicts for all sparsities of tickets."""
        lines: list[dict[str, Any]] = []
        for budget, sparsity in product(BUDGETS, self.sparsities):
            found = self.verdict(budget, sparsity)
            line = {"method": self.own, "sparsity": sparsity, "at equal": budget, "rival": str(found.rival or "none")}
            lines.append({**line, "verdict": found.kind, "worst route": found.worst_kind, **_cells(found.leads)})
        return lines


def _cells(leads: Mapping[str, Lead]) -> dict[str, str]:
    return {f"lead in {title}": lead.cell() for title, lead in leads.items()}


def _number(value: float) -> str:
    """Three decimals with a minus sign; what is rounded to zero has none."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")
