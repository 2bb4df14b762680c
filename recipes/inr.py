"""
Implicit neural representations: one small network per image, one ticket per region (paper, section 4.2).

    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER
    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER --names photo --target_sparsity 0.5
    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER --methods RTL "IMP single" --seeds 0 1 2

The network of an image maps the coordinates of a pixel to its colour. FOLDER has pairs of an image and a picture of
its regions, photo.jpg and photo.regions.png, in which the value of a pixel is its region; or parquet files with both.
The pixels of small regions join the nearest other region (--smallest_region).

The methods, at every sparsity and for every image:

- `RTL`: a ticket per region;
- `IMP single`: one mask, found by iterative magnitude pruning. A learned class embedding, appended to the input, tells
  its network the region. All other weights start as those of `RTL`;
- `IMP single, balanced`: the same, but trained on equally many pixels of every region, as tickets are;
- `IMP single, union`: the same, but with as many weights as the union of the tickets of `RTL`;
- `dense`: the network of `IMP single`, not pruned.

All methods see equally many pixels. Every region has --extraction_steps (100) before each prune event, and
--retraining_steps in each round; a mask for all regions has the sum of these steps. Tickets and `balanced` see equally
many pixels of every region; the other methods see pixels by area. PSNR is that of the image, or the mean over regions.
The command prints tables, writes them with all reports into `results.json` in --output_dir, and draws pictures there.
Repeated, it continues an interrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.backbones import CoordinateMLPConfig
from hf_rtl.plots import route_curves
from shared.arguments import chosen_methods, parse, run_main, set_up
from shared.methods import DENSE, SINGLE, SeedRuns
from shared.models import model_of_round
from shared.plots import draw_reconstructions, draw_scatter
from shared.report import print_tables, training_record, without_prefix, write_results
from shared.scene_data import Pixels, Scene, SceneArguments, encode_regions, load_scenes
from shared.scene_report import BALANCED, METHODS, RTL, correlations, differences, figures, images, psnr


@dataclass
class ComparisonArguments:
    """What is compared, and which images are drawn."""

    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Seeds of weights and batches.")
    learning_rates: list[float] = HfArg(
        default_factory=list, help="Learning rates to run all methods with, in turn; default: --learning_rate."
    )
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="Methods to run.")
    retraining_steps: int = HfArg(default=200, help="Steps of retraining per region and round, which set --max_steps.")
    pictured: list[str] = HfArg(
        default_factory=list, help="Ends of the names of images to draw; default: the first two."
    )
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, SceneArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    set_up(comparison.threads)
    start = time.perf_counter()
    scenes = load_scenes(data)
    all_runs, reports = [], []
    for rate, seed, scene in product(comparison.learning_rates or [args.learning_rate], comparison.seeds, scenes):
        runs = SceneRuns(scene, replace(args, seed=seed, learning_rate=rate), comparison.retraining_steps)
        all_runs.append(runs)
        reports += [report for method in methods for report in runs.reports(method)]
        minutes = (time.perf_counter() - start) / 60
        print(f"{scene.name}, learning rate {rate:g}, seed {seed}: {minutes:.1f} minutes", flush=True)
    tables = {
        "figures": figures(reports),
        "differences": differences(reports),
        "images": images(scenes, reports),
        "correlations": correlations(reports),
    }
    print()
    print_tables(tables)
    output_dir = Path(args.output_dir)
    write_results(
        output_dir / "results.json",
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(comparison),
        training=training_record(args),
        num_images=len(scenes),
        num_regions=sum(len(scene.region_names) for scene in scenes),
        # The pictures show the first learning rate and seed.
        pictures=draw(output_dir, all_runs[: len(scenes)], comparison) if RTL in methods else [],
        **tables,
        reports=reports,
    )


class SceneRuns(SeedRuns):
    """The runs on one image with one seed, below `output_dir/rate-R-seed-N/NAME`."""

    tickets = RTL

    def __init__(self, scene: Scene, args: RTLTrainingArguments, retraining_steps: int) -> None:
        self.scene = scene
        num_regions, settings = len(scene.region_names), f"rate-{args.learning_rate:g}-seed-{args.seed}"
        args = replace(
            args,
            max_steps=retraining_steps * num_regions,
            extraction_steps=100 if args.extraction_steps is None else args.extraction_steps,
            # `collate` needs columns that the model does not take.
            remove_unused_columns=False,
        )
        super().__init__(Path(args.output_dir) / settings / scene.name.replace("/", "-"), args)
        self.all_regions = {"extraction_steps": args.extraction_steps * num_regions, "route_column": None}

    @property
    def num_weights(self) -> int:
        """Prunable weights of the network with one mask: with its class embedding, more than one with tickets has."""
        return self.trained(SINGLE).model.mask_bank.num_weights

    def sparsities(self, method: str) -> list[float]:
        """The sparsity of each round; `IMP single` has a first round at 0, which trains the dense network."""
        sparsities = super().sparsities(method)
        return [0.0, *sparsities] if method == SINGLE else sparsities

    def trainer(self, method: str) -> RTLTrainer:
        region_names = self.scene.region_names
        if method == RTL:
            args = self.arguments(method, route_column="region")
            route_names, num_classes = region_names, 0
        else:
            args = self.arguments(method, **self.all_regions, target_sparsity=self.sparsities(method))
            route_names, num_classes = ["all"], len(region_names)
        config = CoordinateMLPConfig(num_classes=num_classes)
        pixels = Pixels(self.scene, with_classes=num_classes > 0)
        return RTLTrainer(
            RTLModel.from_backbone(config, route_names=route_names, ticket_task="labels", seed=args.seed),
            args,
            train_dataset=pixels.balanced() if method == BALANCED else pixels,
            eval_dataset=pixels,
            data_collator=pixels.collate,
            compute_metrics=self.metrics,
        )

    def rounds(self, method: str) -> list[dict[str, Any]]:
        """The trainer's reports of a method's rounds; `dense` is the first round of `IMP single`."""
        if method == DENSE:
            return self.trained(SINGLE).rounds[:1]
        return self.trained(SINGLE).rounds[1:] if method == SINGLE else self.trained(method).rounds

    def reports(self, method: str) -> Iterator[dict[str, Any]]:
        """A report per round, with `at`: the sparsity of the tickets to compare it with."""
        sparsities = [None] if method == DENSE else self.args.target_sparsity
        for at, report in zip(sparsities, self.rounds(method), strict=True):
            yield self._report(method, at, report)

    def _report(self, method: str, at: float | None, report: dict[str, Any]) -> dict[str, Any]:
        metrics = without_prefix(report["metrics"])
        of_regions = {name: round(metrics[f"{name}/psnr"], 4) for name in self.scene.region_names}
        return {
            "image": self.scene.name,
            "seed": self.args.seed,
            "learning_rate": self.args.learning_rate,
            "method": method,
            "at": at,
            "psnr": metrics["psnr"],
            "psnr_of_regions": of_regions,
            "pixels_of_regions": np.bincount(self.scene.regions.flatten()).tolist(),
            "similarity_of_regions": self.similarity(report).round(6).tolist() if method == RTL else None,
            "mean_similarity": report["mean_similarity"],
            "union": report["union"],
            "weight_bytes": report["footprint"]["compact_bytes"],
            # Every method needs the region of each pixel.
            "side_bytes": len(encode_regions(self.scene.regions)),
            "emptied_layers": report["emptied_layers"],
            "constant_tickets": metrics["constant_tickets"],
            "steps": report["steps"],
            "folder": report["folder"],
        }

    def similarity(self, report: dict[str, Any]) -> np.ndarray:
        """Floats `[K]`: the mean Jaccard similarity of each ticket of a round to the others of the image."""
        matrix = model_of_round(self.trained(RTL), report).mask_bank.similarity().double().fill_diagonal_(torch.nan)
        return matrix.nanmean(1).numpy()

    @torch.no_grad()
    def reconstruction(self, method: str, report: dict[str, Any]) -> np.ndarray:
        """The image as the saved model of a method's round predicts it, floats `[H, W, 3]` in [0, 1]."""
        trainer = self.trained(method)
        data = trainer.eval_dataset
        batch = data.collate([data[index] for index in range(len(data))])
        del batch["labels"]
        model = model_of_round(trainer, report).eval()
        route_ids = data.regions if model.num_routes > 1 else 0
        return model(**batch, route_ids=route_ids).logits.clamp(0, 1).view(*self.scene.regions.shape, -1).numpy()

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """PSNR in dB of the image and of every region, and the number of regions predicted in a single colour."""
        colours, regions = prediction.predictions, self.scene.regions.flatten()
        values = {"psnr": psnr(colours, prediction.label_ids)}
        constant = 0
        for region, name in enumerate(self.scene.region_names):
            inside = regions == region
            values[f"{name}/psnr"] = psnr(colours[inside], prediction.label_ids[inside])
            constant += int((colours[inside] == colours[inside][0]).all())
        return {**values, "constant_tickets": constant}


def draw(output_dir: Path, all_runs: Sequence[SceneRuns], comparison: ComparisonArguments) -> list[str]:
    """Draws the pictures beside the results, and returns their file names."""
    pictured = all_runs[:2]
    if comparison.pictured:
        pictured = [runs for runs in all_runs if runs.scene.name.endswith(tuple(comparison.pictured))]
    methods = [method for method in (RTL, SINGLE) if method in comparison.methods]
    pictures = ["reconstructions.png", "scatter.png"]
    rows = []
    for runs in pictured:
        for method in methods:
            reports = runs.rounds(method)
            titles = [f"{report['sparsity']:.0%}: {report['metrics']['eval_psnr']:.2f} dB" for report in reports]
            colours = [runs.reconstruction(method, report) for report in reports]
            rows.append((method, [runs.scene.image / 255, *colours], ["original", *titles]))
    draw_reconstructions(rows, output_dir / pictures[0])
    for number, runs in enumerate(pictured, start=1):
        sparsities = torch.tensor(runs.args.target_sparsity)
        reports = list(runs.reports(RTL))
        psnrs = torch.tensor([list(report["psnr_of_regions"].values()) for report in reports])
        similarities = torch.tensor([report["similarity_of_regions"] for report in reports])
        panels = [("PSNR (dB)", sparsities, psnrs), ("mean Jaccard similarity", sparsities, similarities)]
        pictures.append(f"curves-{number}.png")
        route_curves(panels, runs.scene.region_names, output_dir / pictures[-1])
    middle = min(all_runs[0].args.target_sparsity, key=lambda sparsity: abs(sparsity - 0.5))
    points = [report for runs in all_runs for report in runs.reports(RTL) if report["at"] == middle]
    draw_scatter(points, output_dir / pictures[1])
    return pictures


if __name__ == "__main__":
    run_main(main)
