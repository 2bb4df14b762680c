"""
Find one ticket per noise scene of a speech enhancement network (the paper's third experiment, section 4.3), and
compare them with single masks and with a network per scene.

    python recipes/speech.py --config recipes/configs/speech.yaml
    python recipes/speech.py --config recipes/configs/speech.yaml --speech FOLDER --noise FOLDER --noise_scenes null
    python recipes/speech.py --config recipes/configs/speech.yaml --seeds 0 --methods "IMP single" "RTL, per route"

Any two folders of audio do. --speech has audio files, of which the last are for testing, or parquet files. --noise has
a subfolder for every scene, or --noise_scenes names the files of each. Speech and noise are mixed at the ratios of
--snrs; every noise recording is split by time, its beginning being for training.

The methods, each for every seed and sparsity:

- `dense`: one network for all scenes, not pruned;
- `IMP single`: one mask for all scenes, of the tickets' density, by iterative magnitude pruning;
- `IMP single, union`: one of the density that the union of the tickets has;
- `IMP multiple`: a network per scene that shares nothing, under the mask of the scene's ticket, on its batches;
- `RTL, shared`: a ticket per scene, with shared statistics of normalisation (the paper's);
- `RTL, per route`: with statistics of their own.

All start from the same initial weights and see equally many mixtures in retraining; both kinds of tickets, and the
networks of `IMP multiple`, have their masks from one extraction. The figure is SI-SNR improvement in dB: that of the
enhanced speech minus that of the mixture. Prints tables of means and standard deviations over the seeds, and writes
into --output_dir: `results.json` with all reports, `spectrograms.png`, and `audio/` with the waveforms that it shows.
Given again, the command continues where it was interrupted.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.backbones import SpeechUNetConfig
from hf_rtl.modeling.files import read_tensors, write_json
from hf_rtl.training.ticket_trainer import TicketTrainer
from shared.arguments import chosen_methods, parse, set_up
from shared.controls import model_of_round
from shared.report import over_seeds, table, write_results
from shared.speech_data import Mixtures, SpeechArguments, load_mixtures, stack
from shared.speech_report import (
    differences,
    enhancement_metrics,
    input_ratios,
    line_of,
    spectrograms,
    split,
    write_audio,
)


DENSE, SINGLE, SINGLE_UNION, MULTIPLE = "dense", "IMP single", "IMP single, union", "IMP multiple"
SHARED, PER_ROUTE = "RTL, shared", "RTL, per route"
METHODS = [DENSE, SINGLE, SINGLE_UNION, MULTIPLE, SHARED, PER_ROUTE]


@dataclass
class ComparisonArguments:
    """What is compared."""

    channels: list[int] = field(
        default_factory=lambda: [12, 12, 12, 24, 48], metadata={"help": "Of the encoder's layers; the paper's."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights, data and batches."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Some of the above."})
    shown_sparsity: float = field(
        default=0.75, metadata={"help": "One of target_sparsity: of the tickets in spectrograms.png and audio/."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, SpeechArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    if comparison.shown_sparsity not in args.target_sparsity:
        raise SystemExit(
            f"--shown_sparsity {comparison.shown_sparsity} is not in --target_sparsity {args.target_sparsity}."
        )
    set_up(comparison.threads)
    output_dir = Path(args.output_dir)
    runs, minutes, pictures = [], [], []
    for number in comparison.seeds:
        start = time.perf_counter()
        seed = Seed(comparison, data, args, number)
        runs.append([(method, report) for method in methods for report in seed.reports(method)])
        minutes.append((time.perf_counter() - start) / 60)
        if number == comparison.seeds[0]:
            shown = {method: seed.enhanced_examples(method) for method in (PER_ROUTE, SINGLE) if method in methods}
            examples = {**seed.examples(), **shown}
            write_audio(output_dir / "audio", examples, seed.test.scene_names, data.sampling_rate)
            if find_spec("matplotlib"):
                pictures.append("spectrograms.png")
                spectrograms(output_dir / pictures[0], examples, seed.test.scene_names, data.sampling_rate)
    names = seed.test.scene_names
    lines = [[line_of(method, report, names) for method, report in run] for run in runs]
    tables = split(over_seeds(lines))
    others = (SINGLE, SINGLE_UNION, MULTIPLE, SHARED)
    tables["differences"] = over_seeds([differences(run, PER_ROUTE, others) for run in lines])
    for title, rows in tables.items():
        if rows:
            print(title, table(rows), sep="\n", end="\n\n")
    write_results(
        output_dir / "results.json",
        pictures=pictures,
        data={**asdict(data), "speech": Path(data.speech).name, "noise": Path(data.noise).name},
        comparison=asdict(comparison),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        num_weights=seed.num_weights,
        num_test=len(seed.test),
        input_ratios=input_ratios(seed.test),
        minutes=minutes,
        **tables,
        runs={
            number: [{"method": method, **report} for method, report in run]
            for number, run in zip(comparison.seeds, runs, strict=True)
        },
    )


class Seed:
    """The runs of one seed, below `output_dir/seed-N`, each trained when it is first asked for."""

    def __init__(
        self, comparison: ComparisonArguments, data: SpeechArguments, args: RTLTrainingArguments, seed: int
    ) -> None:
        self.comparison = comparison
        self.backbone = SpeechUNetConfig(channels=comparison.channels, sampling_rate=data.sampling_rate)
        self.folder = Path(args.output_dir) / f"seed-{seed}"
        self.args = replace(
            args,
            seed=seed,
            extraction_dir=str(self.folder / "extraction"),
            route_column="scene",
        )
        self.train, self.test = load_mixtures(data, seed=seed)

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """Of every round of a method, with `at`, the sparsity of the tickets that it is to be compared with."""
        targets = self.args.target_sparsity
        if method == DENSE:
            yield from self._of_trainer(self._single(method, [0.0]), [0.0])
        elif method == SINGLE:
            yield from self._of_trainer(self.imp_single, targets)
        elif method == SINGLE_UNION:
            sparsities = [1 - report["union"] / self.num_weights for report in self.per_route.rounds]
            yield from self._of_trainer(self._single(method, sparsities), targets)
        elif method == MULTIPLE:
            yield from map(self._multiple, range(len(targets)), self.per_route.rounds)
        elif method == SHARED:
            yield from self._of_trainer(self._tickets(method, "shared"), targets)
        else:
            yield from self._of_trainer(self.per_route, targets)

    @cached_property
    def per_route(self) -> RTLTrainer:
        return self._tickets(PER_ROUTE, "per_route")

    @cached_property
    def imp_single(self) -> RTLTrainer:
        return self._single(SINGLE, self.args.target_sparsity)

    @cached_property
    def num_weights(self) -> int:
        return self._trainer(PER_ROUTE, self.train.scene_names, "per_route").model.mask_bank.num_weights

    def _trainer(self, method: str, route_names: Sequence[str], norm_statistics: str, **changed: Any) -> RTLTrainer:
        model = RTLModel.from_backbone(
            self.backbone,
            route_names=route_names,
            ticket_task="labels",
            seed=self.args.seed,
            norm_statistics=norm_statistics,
        )
        folder = self.folder / method.replace(",", "").replace(" ", "-")
        return RTLTrainer(
            model,
            replace(self.args, output_dir=str(folder), **changed),
            train_dataset=self.train,
            eval_dataset=self.test,
            data_collator=stack,
            compute_metrics=lambda output: enhancement_metrics(torch.from_numpy(output.predictions), self.test),
        )

    def _tickets(self, method: str, norm_statistics: str) -> RTLTrainer:
        trainer = self._trainer(method, self.train.scene_names, norm_statistics)
        trainer.train()
        return trainer

    def _single(self, method: str, sparsities: Sequence[float]) -> RTLTrainer:
        """One mask for all scenes: the same trainer with a single route, and as many samples in both phases."""
        plan = self._trainer(PER_ROUTE, self.train.scene_names, "per_route").plan()
        changed = {"extraction_dir": None, "route_column": None, "target_sparsity": list(sparsities)}
        steps = {"extraction_steps": sum(plan.extraction_steps), "max_steps": plan.retraining_steps}
        trainer = self._trainer(method, ["all"], "per_route", **changed, **steps)
        trainer.train()
        return trainer

    def _of_trainer(self, trainer: RTLTrainer, at: Sequence[float]) -> Iterator[dict[str, Any]]:
        """The reports of a run, with what was spent until the end of each round."""
        plan, events = trainer.plan(), 0
        for report, round_, tickets_at in zip(trainer.rounds, plan.rounds, at, strict=True):
            events += len(round_.kept)
            yield {
                **{name: value for name, value in report.items() if name not in ("log_history", "surroundings")},
                "at": tickets_at,
                "costs": {
                    "trainings": events * trainer.model.num_routes + 1,
                    "samples in extraction": events * sum(plan.extraction_steps) * self.args.route_batch_size,
                    "samples in retraining": plan.retraining_steps * self.args.route_batch_size,
                },
            }

    def _multiple(self, index: int, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a network per scene in a round of the tickets; from disk if it was measured already."""
        of_tickets = list(self._of_trainer(self.per_route, self.args.target_sparsity))[index]
        file = self.folder / MULTIPLE.replace(" ", "-") / f"sparsity-{of_tickets['at']:g}.json"
        if not file.exists():
            model = model_of_round(self.per_route, report)
            tickets = [model.mask_bank[route] for route in range(model.num_routes)]
            enhanced = independent_models(self.per_route, self.test, tickets, round_index=index)
            file.parent.mkdir(exist_ok=True)
            write_json(file, enhancement_metrics(enhanced, self.test))
        costs = of_tickets["costs"]
        return {
            "metrics": json.loads(file.read_text()),
            "at": of_tickets["at"],
            "union": sum(report["kept"].values()),
            "footprint": {"total_bytes": report["footprint"]["independent_bytes"]},
            "emptied_layers": report["emptied_layers"],
            "costs": {**costs, "trainings": costs["trainings"] - 1 + len(report["kept"])},
        }

    def examples(self) -> dict[str, Tensor]:
        """The waveforms of a test mixture of every scene, `[scenes, samples]`."""
        return {"clean": self.test.clean[self._shown], "noisy": self.test.noisy[self._shown]}

    def enhanced_examples(self, method: str) -> Tensor:
        """The same mixtures enhanced by tickets, or by a single mask, of `shown_sparsity`."""
        trainer = self.per_route if method == PER_ROUTE else self.imp_single
        model = model_of_round(
            trainer, trainer.rounds[self.args.target_sparsity.index(self.comparison.shown_sparsity)]
        )
        route_ids = self.test.scenes[self._shown] if method == PER_ROUTE else 0
        with torch.no_grad():
            return model.eval()(input_values=self.test.noisy[self._shown], route_ids=route_ids).logits

    @property
    def _shown(self) -> list[int]:
        """Indices of the first test mixture of every scene, all of the same speech and ratio."""
        return [int((self.test.scenes == scene).nonzero()[0]) for scene in range(len(self.test.scene_names))]


def independent_models(
    trainer: RTLTrainer, test: Mixtures, tickets: Sequence[Sequence[Tensor]], *, round_index: int
) -> Tensor:
    """
    The test mixtures `[N, samples]` enhanced by one network per scene that shares nothing with the others: each
    ticket's masks, trained from θ0 on the batches that its route has in a round.
    """
    network = copy.deepcopy(trainer.model.backbone)
    theta0 = read_tensors(trainer.run_directory.theta0_file)
    names = trainer.model.mask_bank.weight_names

    def loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
        return network(batch["input_values"], labels=batch["labels"]).loss

    plain = TicketTrainer(network, theta0, names, trainer._plain_optimizer, loss, trainer.compute_loss_context_manager)
    enhanced = torch.empty_like(test.noisy)
    trainer.progress.start(trainer.plan().retraining_steps)
    for route, masks in enumerate(tickets):
        trainer.progress.begin_round(f"network of {trainer.model.route_names[route]}")
        batches = (batch for batch in trainer.retraining_batches(round_index) if batch["route"] == route)
        plain.train(masks, batches, seed=(trainer.args.seed, route), on_step=trainer.progress.step)
        own = test.scenes == route
        enhanced[own] = _enhanced(network, test.noisy[own], trainer.args.eval_batch_size, trainer.args.device)
    trainer.progress.finish()
    return enhanced


@torch.no_grad()
def _enhanced(network: Callable[..., Any], noisy: Tensor, batch_size: int, device: torch.device) -> Tensor:
    network.eval()
    return torch.cat([network(batch.to(device)).logits.cpu() for batch in noisy.split(batch_size)])


if __name__ == "__main__":
    main()
