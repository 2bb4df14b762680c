"""
Implicit neural representations: one small network per image, one ticket per region (paper, section 4.2).

    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER
    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER --names photo --target_sparsity 0.5
    python recipes/inr.py --config recipes/configs/inr.yaml --dataset FOLDER --methods RTL "IMP single" --seeds 0 1 2

The network of an image maps the coordinates of a pixel to its colour. FOLDER has images with a picture of regions for
each: photo.jpg and photo.regions.png, where the value of a pixel is its region; or parquet files with both. Small
regions are given to their neighbours (--smallest_region).

The methods, at every sparsity and for every image:

- `RTL`: a ticket per region;
- `IMP single`: one mask, by iterative magnitude pruning, for a network that is told the region, by a learned class
  embedding that is appended to its input; its shared initial weights are those of `RTL`;
- `IMP single, balanced`: the same, trained on as many pixels of every region, as tickets are;
- `IMP single, union`: the same with as many weights as the union of the tickets of `RTL`;
- `dense`: the same, not pruned.

All see as many pixels. Every region has --extraction_steps (100) before each prune event, and --retraining_steps in
each round; one mask for all regions has as many as all of these together. Tickets and `balanced` see as many pixels of
every region, the others as many as it has. PSNR is that of the image, or the mean over its regions. Prints tables, and
writes them with all reports into `results.json` in --output_dir, with pictures beside. Given again, the command
continues where it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers.trainer_utils import EvalPrediction

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from hf_rtl.backbones import CoordinateMLPConfig
from hf_rtl.plots import route_curves
from shared.arguments import chosen_methods, parse, set_up
from shared.plots import draw_reconstructions, draw_scatter
from shared.report import table, write_results
from shared.scene_data import Pixels, Scene, SceneArguments, encode_regions, load_scenes


RTL, SINGLE, BALANCED = "RTL", "IMP single", "IMP single, balanced"
SINGLE_UNION, DENSE = "IMP single, union", "dense"
METHODS = [RTL, SINGLE, BALANCED, SINGLE_UNION, DENSE]
# A rank correlation over fewer regions of one image says nothing.
_MIN_REGIONS = 4


@dataclass
class ComparisonArguments:
    """What is compared, and shown."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights and batches."})
    learning_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Each of these in turn, all methods with the same; default: --learning_rate."},
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Some of the above."})
    retraining_steps: int = field(
        default=200, metadata={"help": "Steps of retraining for each region and round; they become --max_steps."}
    )
    pictured: list[str] = field(
        default_factory=list, metadata={"help": "Images to draw, by the ends of their names; default: the first two."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})


def main() -> None:
    comparison, data, args = parse((ComparisonArguments, SceneArguments, RTLTrainingArguments), description=__doc__)
    methods = chosen_methods(comparison.methods, METHODS)
    set_up(comparison.threads)
    start = time.perf_counter()
    scenes = load_scenes(data)
    runs, reports = [], []
    for rate, seed, scene in product(comparison.learning_rates or [args.learning_rate], comparison.seeds, scenes):
        run = SceneRun(scene, replace(args, seed=seed, learning_rate=rate), comparison.retraining_steps)
        runs.append(run)
        reports += [report for method in methods for report in run.reports(method)]
        minutes = (time.perf_counter() - start) / 60
        print(f"{scene.name}, learning rate {rate:g}, seed {seed}: {minutes:.1f} minutes", flush=True)
    tables = {
        "figures": figures(reports),
        "differences": differences(reports),
        "images": images(scenes, reports),
        "correlations": correlations(reports),
    }
    for name, lines in tables.items():
        if lines:
            print(f"\n{name}", table(lines), sep="\n")
    output_dir = Path(args.output_dir)
    write_results(
        output_dir / "results.json",
        data={**asdict(data), "dataset": Path(data.dataset).name},
        comparison=asdict(comparison),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        num_images=len(scenes),
        num_regions=sum(len(scene.region_names) for scene in scenes),
        # Of the first learning rate and seed.
        pictures=draw(output_dir, runs[: len(scenes)], comparison) if RTL in methods else [],
        **tables,
        reports=reports,
    )


class SceneRun:
    """The trainings on one image with one seed, below `output_dir/rate-R-seed-N/NAME`."""

    def __init__(self, scene: Scene, args: RTLTrainingArguments, retraining_steps: int) -> None:
        self.scene = scene
        num_regions, settings = len(scene.region_names), f"rate-{args.learning_rate:g}-seed-{args.seed}"
        self.args = replace(
            args,
            output_dir=f"{args.output_dir}/{settings}/{scene.name.replace('/', '-')}",
            max_steps=retraining_steps * num_regions,
            extraction_steps=args.extraction_steps or 100,
            # `collate` reads what a sample has.
            remove_unused_columns=False,
        )
        self.all_regions = {"extraction_steps": self.args.extraction_steps * num_regions, "route_column": None}

    @cached_property
    def rtl(self) -> RTLTrainer:
        args = self._arguments(RTL, route_column="region")
        return self._trained(args, CoordinateMLPConfig(), self.scene.region_names)

    @cached_property
    def single(self) -> RTLTrainer:
        """Its first round prunes nothing."""
        return self._one_mask(SINGLE, [0.0, *self.args.target_sparsity])

    @cached_property
    def balanced(self) -> RTLTrainer:
        return self._one_mask(BALANCED, self.args.target_sparsity, balanced=True)

    @cached_property
    def single_union(self) -> RTLTrainer:
        num_weights = self.single.model.mask_bank.num_weights
        return self._one_mask(SINGLE_UNION, [1 - report["union"] / num_weights for report in self.rtl.rounds])

    def reports(self, method: str) -> list[dict[str, Any]]:
        """One per round, with `at`, the sparsity of the tickets that it is to be compared with."""
        sparsities: Sequence[float | None] = self.args.target_sparsity
        if method == RTL:
            rounds = self.rtl.rounds
        elif method == BALANCED:
            rounds = self.balanced.rounds
        elif method == SINGLE_UNION:
            rounds = self.single_union.rounds
        elif method == DENSE:
            rounds, sparsities = self.single.rounds[:1], [None]
        else:
            rounds = self.single.rounds[1:]
        return [self._report(method, at, report) for at, report in zip(sparsities, rounds, strict=True)]

    def _report(self, method: str, at: float | None, report: dict[str, Any]) -> dict[str, Any]:
        metrics = {name.removeprefix("eval_"): value for name, value in report["metrics"].items()}
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
            # All of these methods need to be told a pixel's region.
            "side_bytes": len(encode_regions(self.scene.regions)),
            "emptied_layers": report["emptied_layers"],
            "constant_tickets": metrics["constant_tickets"],
            "steps": report["steps"],
            "folder": report["folder"],
        }

    def similarity(self, report: dict[str, Any]) -> np.ndarray:
        """Floats `[K]`: the mean Jaccard similarity of each ticket of a round to the others of the image."""
        matrix = self._model(self.rtl, report).mask_bank.similarity().double().fill_diagonal_(torch.nan)
        return matrix.nanmean(1).numpy()

    @torch.no_grad()
    def reconstruction(self, trainer: RTLTrainer, report: dict[str, Any]) -> np.ndarray:
        """Colours `[H, W, 3]` in [0, 1] that the saved model of a round gives."""
        data = trainer.eval_dataset
        batch = data.collate([data[index] for index in range(len(data))])
        del batch["labels"]
        model = self._model(trainer, report).eval()
        route_ids = data.regions if model.num_routes > 1 else 0
        return model(**batch, route_ids=route_ids).logits.clamp(0, 1).view(*self.scene.regions.shape, -1).numpy()

    def _model(self, trainer: RTLTrainer, report: dict[str, Any]) -> RTLModel:
        return RTLModel.from_pretrained(f"{trainer.args.output_dir}/{report['folder']}")

    def _arguments(self, method: str, **changed: Any) -> RTLTrainingArguments:
        return replace(
            self.args, output_dir=f"{self.args.output_dir}/{method.replace(',', '').replace(' ', '-')}", **changed
        )

    def _one_mask(self, method: str, sparsities: list[float], *, balanced: bool = False) -> RTLTrainer:
        args = self._arguments(method, **self.all_regions, target_sparsity=sparsities)
        config = CoordinateMLPConfig(num_classes=len(self.scene.region_names))
        return self._trained(args, config, ["all"], balanced=balanced)

    def _trained(
        self,
        args: RTLTrainingArguments,
        config: CoordinateMLPConfig,
        route_names: Sequence[str],
        *,
        balanced: bool = False,
    ) -> RTLTrainer:
        pixels = Pixels(self.scene, with_classes=config.num_classes > 0)
        trainer = RTLTrainer(
            RTLModel.from_backbone(config, route_names=route_names, ticket_task="labels", seed=args.seed),
            args,
            train_dataset=pixels.balanced() if balanced else pixels,
            eval_dataset=pixels,
            data_collator=pixels.collate,
            compute_metrics=self.metrics,
        )
        trainer.train()
        return trainer

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """PSNR of the image and of every region, and the number of regions that are all of one colour."""
        colours, regions = prediction.predictions, self.scene.regions.flatten()
        values = {"psnr": psnr(colours, prediction.label_ids)}
        constant = 0
        for region, name in enumerate(self.scene.region_names):
            inside = regions == region
            values[f"{name}/psnr"] = psnr(colours[inside], prediction.label_ids[inside])
            constant += int((colours[inside] == colours[inside][0]).all())
        return {**values, "constant_tickets": constant}


def psnr(colours: np.ndarray, target: np.ndarray) -> float:
    """
    Peak signal-to-noise ratio in dB for a peak of 1, from the squared error over all pixels and channels.

    Args:
        colours (`np.ndarray`): floats `[N, 3]`, clamped to [0, 1] here, as whoever shows them must do.
        target (`np.ndarray`): floats `[N, 3]` in [0, 1].
    """
    error = np.clip(colours.astype(np.float64), 0, 1) - target.astype(np.float64)
    squared = np.mean(error**2)
    return float("inf") if squared == 0 else float(-10 * np.log10(squared))


def figures(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    A line per learning rate, sparsity and method: the mean over images, of PSNR also the sample standard deviation
    over them.
    """
    lines = []
    for (rate, at, method), found in _grouped(reports, lambda r: (r["learning_rate"], r["at"], r["method"])):
        of_images = [mean(report["psnr"] for report in same) for _, same in _grouped(found, lambda r: r["image"])]
        of_regions = [_mean_of_regions(same) for _, same in _grouped(found, lambda r: r["image"])]
        worst = [min(report["psnr_of_regions"].values()) for report in found]
        num_seeds = len({report["seed"] for report in found})
        similarities = [report["mean_similarity"] for report in found if report["mean_similarity"] is not None]
        lines.append(
            {
                "method": method,
                "sparsity": at,
                "learning rate": f"{rate:g}",
                "PSNR (dB)": _with_spread(of_images),
                "mean of regions (dB)": _with_spread(of_regions),
                "worst region (dB)": f"{mean(worst):.2f}",
                "weights": round(mean(report["union"] for report in found)),
                "bytes of weights and masks": round(mean(report["weight_bytes"] for report in found)),
                "of the region map": round(mean(report["side_bytes"] for report in found)),
                "together": round(mean(report["weight_bytes"] + report["side_bytes"] for report in found)),
                "mean Jaccard": mean(similarities) if method == RTL and similarities else None,
                "emptied layers (worst)": max(
                    len(layers) for report in found for layers in [[], *report["emptied_layers"].values()]
                ),
                "regions of one colour": round(sum(report["constant_tickets"] for report in found) / num_seeds),
            }
        )
    order = {title: number for number, title in enumerate(METHODS)}
    return sorted(
        lines, key=lambda line: (-float(line["learning rate"]), line["sparsity"] or 0, order[line["method"]])
    )


def differences(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how many dB the tickets are better than each other method with the same learning rate, image by image."""
    psnrs = {
        key: (mean(report["psnr"] for report in same), _mean_of_regions(same))
        for key, same in _grouped(reports, lambda r: (r["learning_rate"], r["method"], r["at"], r["image"]))
    }
    lines = []
    for rate, at in dict.fromkeys((rate, at) for rate, method, at, _ in psnrs if method == RTL):
        for other in (SINGLE, BALANCED, SINGLE_UNION, DENSE):
            at_other = None if other == DENSE else at
            pairs = [
                (psnrs[rate, RTL, at, image], psnrs[rate, other, at_other, image])
                for image in dict.fromkeys(image for *_, image in psnrs)
                if (rate, other, at_other, image) in psnrs
            ]
            if pairs:
                gains, of_regions = ([rtl[kind] - single[kind] for rtl, single in pairs] for kind in (0, 1))
                lines.append(
                    {
                        "learning rate": f"{rate:g}",
                        "sparsity": at,
                        "RTL minus": other,
                        "dB": _with_spread(gains),
                        "least": f"{min(gains):.2f}",
                        "most": f"{max(gains):.2f}",
                        "images where RTL is better": f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
                        "dB, mean of regions": _with_spread(of_regions),
                        "better images so": f"{sum(gain > 0 for gain in of_regions)} of {len(gains)}",
                    }
                )
    return lines


def images(scenes: Sequence[Scene], reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """PSNR of every image, with the first learning rate."""
    lines = []
    for scene in scenes:
        height, width = scene.regions.shape
        line: dict[str, Any] = {"image": scene.name, "size": f"{width}×{height}", "regions": len(scene.region_names)}
        own = [
            report
            for report in reports
            if report["image"] == scene.name
            and report["learning_rate"] == reports[0]["learning_rate"]
            and report["method"] not in (BALANCED, SINGLE_UNION)
        ]
        for (method, at), same in _grouped(own, lambda report: (report["method"], report["at"])):
            title = method if at is None else f"{method} {at:.0%}"
            line[title] = f"{mean(report['psnr'] for report in same):.2f}"
        lines.append(line)
    return lines


def correlations(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Spearman's rank correlations over regions, per learning rate and sparsity: of a region's PSNR with the mean
    similarity of its ticket to the others of its image, over all regions and within images, and of both with the
    region's size.
    """
    lines = []
    tickets = [report for report in reports if report["method"] == RTL and len(report["psnr_of_regions"]) > 1]
    for (rate, at), found in _grouped(tickets, lambda report: (report["learning_rate"], report["at"])):
        psnrs = [list(report["psnr_of_regions"].values()) for report in found]
        similarities = [report["similarity_of_regions"] for report in found]
        sizes = [report["pixels_of_regions"] for report in found]
        within = [
            float(spearmanr(one, other).statistic)
            for one, other in zip(psnrs, similarities, strict=True)
            if len(one) >= _MIN_REGIONS
        ]
        spread = f"{mean(within):.3f} ({min(within):.3f} to {max(within):.3f})" if within else None
        all_psnrs, all_similarities, all_sizes = (np.concatenate(parts) for parts in (psnrs, similarities, sizes))
        lines.append(
            {
                "learning rate": f"{rate:g}",
                "sparsity": at,
                "regions": len(all_psnrs),
                "PSNR with similarity": float(spearmanr(all_psnrs, all_similarities).statistic),
                "within images, mean (range)": spread,
                "such images": len(within),
                "PSNR with size": float(spearmanr(all_psnrs, all_sizes).statistic),
                "similarity with size": float(spearmanr(all_similarities, all_sizes).statistic),
            }
        )
    return lines


def draw(output_dir: Path, runs: Sequence[SceneRun], comparison: ComparisonArguments) -> list[str]:
    """The names of pictures that are drawn beside the results."""
    pictured = (
        [run for run in runs if run.scene.name.endswith(tuple(comparison.pictured))]
        if comparison.pictured
        else runs[:2]
    )
    methods = [method for method in (RTL, SINGLE) if method in comparison.methods]
    pictures = ["reconstructions.png", "scatter.png"]
    rows = []
    for run in pictured:
        for method in methods:
            trainer = run.rtl if method == RTL else run.single
            reports = run.rtl.rounds if method == RTL else run.single.rounds[1:]
            titles = [f"{report['sparsity']:.0%}: {report['metrics']['eval_psnr']:.2f} dB" for report in reports]
            colours = [run.reconstruction(trainer, report) for report in reports]
            rows.append((method, [run.scene.image / 255, *colours], ["original", *titles]))
    draw_reconstructions(rows, output_dir / pictures[0])
    for number, run in enumerate(pictured, start=1):
        sparsities = torch.tensor(run.args.target_sparsity)
        reports = run.reports(RTL)
        panels = [
            ("PSNR (dB)", sparsities, torch.tensor([list(report["psnr_of_regions"].values()) for report in reports])),
            (
                "mean Jaccard similarity",
                sparsities,
                torch.tensor([report["similarity_of_regions"] for report in reports]),
            ),
        ]
        pictures.append(f"curves-{number}.png")
        route_curves(panels, run.scene.region_names, output_dir / pictures[-1])
    middle = min(runs[0].args.target_sparsity, key=lambda sparsity: abs(sparsity - 0.5))
    points = [report for run in runs for report in run.reports(RTL) if report["at"] == middle]
    draw_scatter(points, output_dir / pictures[1])
    return pictures


def _grouped(lines: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The lines of each key, in the order in which keys first come."""
    order = {value: number for number, value in reversed(list(enumerate(map(key, lines))))}
    together = sorted(lines, key=lambda line: order[key(line)])
    return [(value, list(same)) for value, same in groupby(together, key)]


def _mean_of_regions(reports: Sequence[dict[str, Any]]) -> float:
    """The mean PSNR over regions, however large, and over the reports."""
    return mean(mean(report["psnr_of_regions"].values()) for report in reports)


def _with_spread(values: Sequence[float]) -> str:
    """The mean, and of several values the sample standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
