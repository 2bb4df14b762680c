"""
Find one ticket per class, or per group of classes, of an image classification data set.

    python recipes/prune.py --config recipes/configs/digits.yaml
    python recipes/prune.py --config recipes/configs/cifar10.yaml --target_sparsity 0.5 --seed 1
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/prune.py --config FILE
    python -m torch.distributed.run --nproc_per_node 2 recipes/prune.py --config FILE --use_cpu

Prints the plan, then a progress bar, then a table; writes `results.json` and `curve.png` into --output_dir, with one
complete model per round beside them. A run that was interrupted continues when the same command is given again.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from arguments import parse
from image_data import DataArguments, load_images
from report import plan_text, plot, row, table, write_results
from sanity import controls

from hf_rtl import RTLModelForImageClassification, RTLTrainer, RTLTrainingArguments


@dataclass
class ModelArguments:
    """Which backbone, and what its tickets are."""

    backbone: str = field(default="ghostnet_rtl", metadata={"help": "A timm name, a repo id or a folder."})
    norm_statistics: str = field(
        default="per_route",
        metadata={"help": "Running statistics of normalisation: per_route, or shared (the paper's)."},
    )
    prune_include: list[str] = field(default_factory=list, metadata={"help": "Patterns of further weights to prune."})
    prune_exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of weights never to prune."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch decides."})
    sanity: bool = field(
        default=False,
        metadata={
            "help": "Also random and layer-shuffled masks, routes shifted by one, and a dense one-vs-rest model."
        },
    )


def main() -> None:
    model_arguments, data, args = parse((ModelArguments, DataArguments, RTLTrainingArguments), description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if model_arguments.threads is not None:
        torch.set_num_threads(model_arguments.threads)
    train, test = load_images(data, seed=args.seed)
    model = RTLModelForImageClassification.from_backbone(
        model_arguments.backbone,
        route_names=train.label_names,
        ticket_task="membership",
        seed=args.seed,
        norm_statistics=model_arguments.norm_statistics,
        prune_include=model_arguments.prune_include,
        prune_exclude=model_arguments.prune_exclude,
        in_chans=data.num_channels,
    )
    trainer = RTLTrainer(model, args, train_dataset=train, eval_dataset=test)
    trainer.card_data = trainer.card_data.updated(data.on_card())
    main_process = trainer.is_world_process_zero()
    if main_process:
        text = plan_text(trainer.plan(), batch_size=args.route_batch_size, num_processes=args.world_size)
        print(text, flush=True)
    trainer.train()
    rows = [row("RTL", report["sparsity"], report) for report in trainer.rounds]
    # Before the controls, which train and evaluate with the same trainer.
    reports = list(trainer.rounds)
    extra = controls(trainer, train, test, model_arguments.backbone, data) if model_arguments.sanity else []
    rows += [row(control["method"], control["sparsity"], control) for control in extra]
    if not main_process:
        return
    output_dir = Path(args.output_dir)
    # Not in the models' folders, which are pushed: it may name a place on this machine.
    data.save(output_dir)
    print(table(rows))
    for report in reports:
        report.pop("log_history", None)
    for control in extra:
        control.pop("log_history", None)
    write_results(
        output_dir / "results.json",
        data=asdict(data),
        model=asdict(model_arguments),
        training={name: value for name, value in args.to_dict().items() if not name.endswith("_dir")},
        num_processes=args.world_size,
        num_test=len(test),
        rounds=reports,
        controls=extra,
        table=rows,
    )
    if find_spec("matplotlib"):
        plot(output_dir / "curve.png", rows, {report["sparsity"]: report["mean_similarity"] for report in reports})


if __name__ == "__main__":
    main()
