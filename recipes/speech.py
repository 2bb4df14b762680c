"""
Find one ticket per noise scene of a speech enhancement network (the paper's third experiment, section 4.3), and
compare them with single masks and with a network per scene.

    python recipes/speech.py --config recipes/configs/speech.yaml
    python recipes/speech.py --config recipes/configs/speech.yaml --speech FOLDER --noise FOLDER --noise_scenes null
    python recipes/speech.py --config recipes/configs/speech.yaml --seeds 0 --methods "IMP single" "RTL, per route"

Any folder of speech and any folder of noise will do. --speech has audio files, of which the last are for testing, or
parquet files. --noise has a subfolder for every scene, or --noise_scenes names the files of each. Speech and noise are
mixed at the ratios of --snrs. The beginning of every noise recording is for training, the rest for testing.

The methods, each for every seed and sparsity:

- `dense`: one network for all scenes, not pruned;
- `IMP single`: one mask for all scenes, of the tickets' density, by iterative magnitude pruning;
- `IMP single, union`: one mask for all scenes, as dense as the union of the tickets;
- `IMP multiple`: a separate network per scene, with the mask and the batches of the scene's ticket;
- `RTL, shared`: a ticket per scene, with shared statistics of normalisation (the paper's);
- `RTL, per route`: a ticket per scene, with its own statistics.

All methods start from the same initial weights and see equally many mixtures in retraining. Both kinds of tickets, and
the networks of `IMP multiple`, have their masks from one extraction. The metric is SI-SNR improvement in dB: the
SI-SNR of the enhanced speech minus that of the mixture. The command prints means and standard deviations over seeds,
and writes `results.json` with all reports, `spectrograms.png` and its waveforms, `audio/`, into --output_dir.
Repeated, it continues an interrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.backbones import SpeechUNetConfig
from shared.arguments import chosen_methods, parse, run_main, set_up
from shared.methods import DENSE, MULTIPLE, SINGLE, SINGLE_UNION, SeedRuns, independent_costs
from shared.models import model_of_round, tickets_of_round
from shared.plain_networks import independent_networks
from shared.report import over_seeds, print_tables, training_record, write_results
from shared.speech_data import Mixtures, SpeechArguments, load_mixtures, stack
from shared.speech_report import differences, enhancement_metrics, input_ratios, report_line, split, write_audio


SHARED, PER_ROUTE = "RTL, shared", "RTL, per route"
# Tickets -> their normalisation statistics.
TICKETS = {SHARED: "shared", PER_ROUTE: "per_route"}
METHODS = [DENSE, SINGLE, SINGLE_UNION, MULTIPLE, *TICKETS]


@dataclass
class ComparisonArguments:
    """What is compared."""

    channels: list[int] = HfArg(
        default_factory=lambda: [12, 12, 12, 24, 48], help="Channels of the encoder's layers, by default the paper's."
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="For weights, data and batches.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="Methods to run.")
    shown_sparsity: float = HfArg(default=0.75, help="Sparsity of the tickets in spectrograms.png and audio/.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, SpeechArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    if comparison.shown_sparsity not in args.target_sparsity:
        raise SystemExit(
            f"--shown_sparsity {comparison.shown_sparsity} is not in --target_sparsity {args.target_sparsity}."
        )
    set_up(comparison.threads)
    output_dir = Path(args.output_dir)
    reports, minutes, pictures = [], [], []
    for seed in comparison.seeds:
        start = time.perf_counter()
        runs = SpeechRuns(comparison, data, args, seed)
        reports.append(runs.all_reports(methods))
        minutes.append((time.perf_counter() - start) / 60)
        if seed == comparison.seeds[0]:
            pictures = show_examples(runs, methods, output_dir)
    names = runs.test.scene_names
    lines = [[report_line(report, names) for report in of_seed] for of_seed in reports]
    tables = split(over_seeds(lines))
    others = (SINGLE, SINGLE_UNION, MULTIPLE, SHARED)
    tables["differences"] = over_seeds([differences(of_seed, PER_ROUTE, others) for of_seed in lines])
    print_tables(tables)
    write_results(
        output_dir / "results.json",
        pictures=pictures,
        data={**asdict(data), "speech": Path(data.speech).name, "noise": Path(data.noise).name},
        comparison=asdict(comparison),
        training=training_record(args),
        num_weights=runs.num_weights,
        num_test=len(runs.test),
        input_ratios=input_ratios(runs.test),
        minutes=minutes,
        **tables,
        runs=dict(zip(comparison.seeds, reports, strict=True)),
    )


def show_examples(runs: SpeechRuns, methods: Sequence[str], output_dir: Path) -> list[str]:
    """Writes and draws the waveforms of a test mixture per scene; returns the file names of the pictures."""
    shown = {method: runs.enhanced_examples(method) for method in (PER_ROUTE, SINGLE) if method in methods}
    examples = {**runs.examples(), **shown}
    scene_names, sampling_rate = runs.test.scene_names, runs.backbone.sampling_rate
    write_audio(output_dir / "audio", examples, scene_names, sampling_rate)
    if not find_spec("matplotlib"):
        return []
    from shared.plots import draw_spectrograms

    draw_spectrograms(examples, scene_names, sampling_rate, output_dir / "spectrograms.png")
    return ["spectrograms.png"]


class SpeechRuns(SeedRuns):
    """The runs of one seed, below `output_dir/seed-N`."""

    tickets = PER_ROUTE
    left_out = ("log_history", "surroundings")

    def __init__(
        self, comparison: ComparisonArguments, data: SpeechArguments, args: RTLTrainingArguments, seed: int
    ) -> None:
        folder = Path(args.output_dir) / f"seed-{seed}"
        super().__init__(
            folder, replace(args, seed=seed, extraction_dir=str(folder / "extraction"), route_column="scene")
        )
        self.backbone = SpeechUNetConfig(channels=comparison.channels, sampling_rate=data.sampling_rate)
        self.shown_sparsity = comparison.shown_sparsity
        self.train, self.test = load_mixtures(data, seed=seed)

    def trainer(self, method: str) -> RTLTrainer:
        if method in TICKETS:
            return self._trainer(self.arguments(method), self.train.scene_names, TICKETS[method])
        # One mask for all scenes: the same trainer with a single route, and equally many samples in both phases.
        sparsities, plan = self.sparsities(method), self.trainer(PER_ROUTE).plan()
        args = self.arguments(
            method,
            extraction_dir=None,
            route_column=None,
            target_sparsity=sparsities,
            extraction_steps=sum(plan.extraction_steps),
            max_steps=plan.retraining_steps,
        )
        return self._trainer(args, ["all"], "per_route")

    def _trainer(self, args: RTLTrainingArguments, route_names: Sequence[str], norm_statistics: str) -> RTLTrainer:
        model = RTLModel.from_backbone(
            self.backbone,
            route_names=route_names,
            ticket_task="labels",
            seed=args.seed,
            norm_statistics=norm_statistics,
        )
        return RTLTrainer(
            model,
            args,
            train_dataset=self.train,
            eval_dataset=self.test,
            data_collator=stack,
            compute_metrics=lambda output: enhancement_metrics(torch.from_numpy(output.predictions), self.test),
        )

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """The reports of every round, or of the networks per scene that take the place of its tickets."""
        if method != MULTIPLE:
            yield from super().reports(method)
            return
        for index, report in enumerate(list(super().reports(PER_ROUTE))):
            yield self._independent_report(index, report)

    def _independent_report(self, index: int, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a network per scene, with the masks of the tickets of a round."""

        def measure() -> dict[str, float]:
            trainer = self.trained(PER_ROUTE)
            tickets = tickets_of_round(trainer, report)
            return enhancement_metrics(enhanced_apart(trainer, self.test, tickets, round_index=index), self.test)

        metrics = self.measured(MULTIPLE, report["at"], measure)
        return {"metrics": metrics, "at": report["at"], **independent_costs(report)}

    def examples(self) -> dict[str, Tensor]:
        """The waveforms of a test mixture of every scene, `[scenes, samples]`."""
        return {"clean": self.test.clean[self._shown], "noisy": self.test.noisy[self._shown]}

    def enhanced_examples(self, method: str) -> Tensor:
        """The mixtures of `examples`, enhanced by tickets or by a single mask of `shown_sparsity`."""
        trainer = self.trained(method)
        report = trainer.rounds[self.args.target_sparsity.index(self.shown_sparsity)]
        model = model_of_round(trainer, report).eval()
        route_ids = self.test.scenes[self._shown] if model.num_routes > 1 else 0
        with torch.no_grad():
            return model(input_values=self.test.noisy[self._shown], route_ids=route_ids).logits

    @property
    def _shown(self) -> list[int]:
        """Indices of the first test mixture of every scene; all have the same speech and ratio."""
        return [int((self.test.scenes == scene).nonzero()[0]) for scene in range(len(self.test.scene_names))]


def enhanced_apart(
    trainer: RTLTrainer, test: Mixtures, tickets: Sequence[Sequence[Tensor]], *, round_index: int
) -> Tensor:
    """The test mixtures `[N, samples]` enhanced by one network per scene, as `independent_networks` trains them."""

    def loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
        return network(batch["input_values"], labels=batch["labels"]).loss

    enhanced = torch.empty_like(test.noisy)
    for scene, network in enumerate(independent_networks(trainer, tickets, loss, round_index=round_index)):
        own = test.scenes == scene
        enhanced[own] = _enhanced(network, test.noisy[own], trainer.args.eval_batch_size, trainer.args.device)
    return enhanced


@torch.no_grad()
def _enhanced(network: nn.Module, noisy: Tensor, batch_size: int, device: torch.device) -> Tensor:
    network.eval()
    return torch.cat([network(batch.to(device)).logits.cpu() for batch in noisy.split(batch_size)])


if __name__ == "__main__":
    run_main(main)
