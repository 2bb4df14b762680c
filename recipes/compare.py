"""
Are tickets ahead of what they must beat? The same data through tickets and their rivals, over seeds, with a verdict.

    python recipes/compare.py --dataset scans --route_column hospital --backbone test_resnet --target_sparsity 0.5 0.75
    python recipes/compare.py --config recipes/configs/digits.yaml --seeds 0 1 2 --methods dense "one mask" tickets
    python recipes/compare.py --dataset texts --route_column domain --backbone FOLDER --one_pass

The arguments are those of prune.py. The methods, each for every seed and sparsity:

- `dense`: one network for all routes, not pruned;
- `one mask`: that network with one mask as sparse as a ticket, found and trained in the same way on as many samples;
- `one mask at the union's density`: with a mask as dense as all tickets together;
- `one mask, each logit alone`: for membership tickets, that network with a logit per route, each trained on the
  batches of its ticket and deciding by itself, as tickets do;
- `a model per route`: a network of its own for each route, with the ticket's mask and the route's batches;
- `one mask, LoRA per route`: the network with one mask, and an adapter for each route, as large as fit into the bytes
  of the tickets (PEFT: pip install "hf_rtl[bench]");
- `random tickets`, `layer-shuffled tickets` (random in every layer), `another route's tickets`: what the choice of the
  weights is worth;
- `tickets`.

With --one_pass, a dense network is trained, and units are removed without training; some methods then solve anew the
weights that read the units, `+ refit`. The quality is accuracy, of tokens for language models; of membership tickets
it is the AUROC of their score. Tickets in one pass are parts of a network with a logit for each route, so their score
is the logarithm of its route's probability. The command prints tables and two sentences, which say whether tickets are
ahead, behind, or whether that is not decided: at equal time of a call, and at equal bytes. It writes them into
`results.json` in --output_dir, and draws `curves.png`. Repeated, it continues an interrupted comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from hf_rtl import RTLTrainingArguments
from shared import one_pass, round_methods
from shared.arguments import check_same, chosen_methods, parse, run_main, set_up
from shared.data_arguments import DataArguments, ModelArguments
from shared.one_pass import DENSE, TICKETS, OnePass, Served, call_times
from shared.one_pass_run import OnePassArguments, calibration_data
from shared.prepare import Prepared, bad_input, prepare
from shared.quality import Quality
from shared.report import over_seeds, print_tables, row, training_record, write_results
from shared.round_methods import RoundMethods
from shared.verdict import BUDGETS, Comparison, Figures


METHODS = list(dict.fromkeys([*round_methods.METHODS, *one_pass.METHODS]))


@dataclass
class ComparisonArguments(OnePassArguments):
    """What is compared."""

    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="For weights, data and batches; at least three.")
    methods: list[str] = HfArg(default_factory=list, help="Methods to compare; default: all.")
    adapter_learning_rate: float = HfArg(default=1e-3, help="Learning rate of LoRA adapters.")
    timed_samples: int = HfArg(default=8, help="Samples of a call whose time is measured.")


def main() -> None:
    compared, model, data, args = parse(
        (ComparisonArguments, ModelArguments, DataArguments, RTLTrainingArguments),
        description=__doc__,
        defaults={"prune_scope": "layer"},
    )
    set_up(model.threads)
    known = one_pass.METHODS if compared.one_pass else round_methods.METHODS
    methods = chosen_methods(compared.methods or known, known)
    methods = [method for method in known if method in (*methods, DENSE, TICKETS)]
    same = {**asdict(model), **asdict(data), **asdict(compared), **training_record(args)}
    decisive = {name: value for name, value in same.items() if name not in ("seeds", "seed", "methods", "threads")}
    check_same(Path(args.output_dir, "comparison.json"), decisive, kind="a comparison")
    figures, decisions, unit = [], [], ""
    for seed in compared.seeds:
        with bad_input():
            prepared = prepare(data, model.backbone, route_column=args.route_column, seed=seed, **model.options())
        runs = SeedComparison(compared, prepared, replace(args, seed=seed))
        unit = runs.quality.unit
        figures.extend(runs.figures(methods))
        decisions.append(runs.decisions)
    comparison = Comparison(figures, unit)
    tables = {
        "methods": comparison.method_rows(),
        "differences": comparison.difference_rows(),
        "verdicts": comparison.verdict_rows(),
        "decisions": over_seeds(decisions),
    }
    print()
    print_tables(tables)
    sentences = [comparison.verdict(budget).sentence for budget in BUDGETS]
    print("\n".join(sentences))
    output_dir = Path(args.output_dir)
    pictures = []
    if find_spec("matplotlib"):
        from shared.plots import draw_methods

        pictures.append("curves.png")
        draw_methods(lines_of_seeds(comparison), [unit, f"worst {unit}"], output_dir / pictures[0])
    write_results(
        output_dir / "results.json",
        pictures=pictures,
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(compared),
        model={**asdict(model), "backbone": Path(model.backbone).name},
        training=training_record(args),
        **tables,
        sentences=sentences,
        figures=[asdict(run) for run in figures],
    )


class SeedComparison:
    """
    The figures of all methods of one seed, below `output_dir/seed-N`. Each is measured once, and read back later.

    Args:
        compared ([`ComparisonArguments`]): what is compared.
        prepared ([`Prepared`]): data and models of the seed.
        args ([`RTLTrainingArguments`]): the arguments of all trainings, with the seed.
    """

    def __init__(self, compared: ComparisonArguments, prepared: Prepared, args: RTLTrainingArguments) -> None:
        folder = Path(args.output_dir) / f"seed-{args.seed}"
        self.compared, self.prepared, self.args = compared, prepared, args
        self.runs = RoundMethods(prepared, args, folder, compared.adapter_learning_rate)
        self.quality = Quality(prepared, args.per_device_eval_batch_size)
        self.inputs = self.quality.sample_batch(compared.timed_samples)
        self.decisions: list[dict[str, Any]] = []

    def figures(self, methods: list[str]) -> Iterator[Figures]:
        """The figures of the methods, at every sparsity; those of the dense network once."""
        if self.prepared.rows.ticket_task == "labels":
            methods = [method for method in methods if method not in round_methods.OF_MEMBERSHIP]
        for index, sparsity in enumerate(sorted(self.args.target_sparsity)):
            serving = self._served(methods, index, sparsity)
            for method in methods:
                at = 0.0 if method == DENSE else sparsity
                if method == DENSE and index:
                    continue
                found = self.runs.measured(method, at, partial(self._measure, method, serving))
                if not found:
                    print(f"seed {self.args.seed}, {method}, {at:.0%}: left out, none is as small as the tickets")
                    continue
                shown = ", ".join(f"{name} {value:.3f}" for name, value in found["quality"].items())
                print(f"seed {self.args.seed}, {method}, {at:.0%}: {shown}", flush=True)
                if found["metrics"]:
                    self.decisions.append(row(method, at, found))
                yield Figures(self.args.seed, method, at, found["quality"], found["ms"], found["bytes"])

    def _measure(self, method: str, serving: Iterator[tuple[str, Served | None]]) -> dict[str, Any]:
        """Quality of every route, milliseconds of a call, and bytes; nothing if the method has no such models."""
        # Those that were read back were passed over.
        served = next(served for name, served in serving if name == method)
        if served is None:
            return {}
        of_routes, metrics = self.quality(served)
        found = {name: figures[self.quality.unit] for name, figures in of_routes.items()}
        times = call_times({DENSE: self._dense, method: served.models[0]}, self.inputs)
        if method != DENSE:
            # A ratio that was measured in turn, times one time of the dense network: those of other minutes differ.
            reference = self.runs.measured(DENSE, 0.0, dict)["ms"]
            times[method] = reference * times[method] / times[DENSE]
        return {"quality": found, "metrics": metrics, "ms": times[method], "bytes": served.stored_bytes}

    @cached_property
    def _dense(self) -> PreTrainedModel:
        return self.runs.serve(DENSE, 0).models[0]

    def _served(self, methods: list[str], index: int, sparsity: float) -> Iterator[tuple[str, Served | None]]:
        """Every method with its models, in the order of `methods`, each made when it is asked for."""
        if not self.compared.one_pass:
            for method in methods:
                yield method, self.runs.serve(method, index)
            return
        data = calibration_data(self.prepared, self.compared.calibration_samples, self.args.seed)
        options = self.compared.options(self.args)
        yield from OnePass(self._dense, data, self.prepared.rows.route_names, sparsity, options).serve()


def lines_of_seeds(comparison: Comparison) -> list[list[dict[str, Any]]]:
    """The lines of every seed for `draw_methods`."""
    num_seeds = len(next(iter(comparison.runs.values())))
    return [[comparison.line(at, place) for at in comparison.runs] for place in range(num_seeds)]


if __name__ == "__main__":
    run_main(main)
