"""
Find one ticket per class, per group of classes, or per value of a column, of any data: images, sounds, texts.

    python recipes/prune.py --config recipes/configs/digits.yaml
    python recipes/prune.py --config recipes/configs/cifar10.yaml --target_sparsity 0.5 --seed 1
    python recipes/prune.py --dataset scans --route_column hospital --backbone resnet18 --output_dir runs/scans
    python recipes/prune.py --dataset reviews.csv --route_column domain --backbone FOLDER --output_dir runs/reviews
    python recipes/prune.py --dataset notes.jsonl --task causal --route_column author --backbone FOLDER
    python recipes/prune.py --dataset notes.jsonl --task causal --route_column author --backbone FOLDER --one_pass
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/prune.py --config FILE
    python -m torch.distributed.run --nproc_per_node 2 recipes/prune.py --config FILE --use_cpu

The command prints the plan, a progress bar and a table. It writes into --output_dir `report.html`, a page on
what came out and what to try next, `results.json`, `curve.png` and a complete model per round. Run the same command
again to continue an interrupted run.

With --one_pass it trains a dense network for all routes, and finds tickets of whole units in it, by what each unit
does on --calibration_samples of a route, without training; with --num_train_epochs 0 the network is the backbone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from hf_rtl import RTLTrainer, RTLTrainingArguments
from shared.arguments import parse, run_main, set_up
from shared.check_rows import routes_by_labels
from shared.controls import dense_network, dense_one_vs_rest, labels_controls, membership_controls
from shared.data_arguments import DataArguments, ModelArguments
from shared.one_pass_run import FoundArguments, check_directory, one_pass_arguments, one_pass_run
from shared.prepare import Prepared, bad_input, prepare
from shared.report import method_rows, plan_text, routes_rows, table, training_record, write_results
from shared.run_page import write_run_page


@dataclass
class ReportArguments(FoundArguments):
    """What is trained: tickets in rounds or dense networks and tickets in one pass, and what beside them."""

    dense: bool = HfArg(
        default=True, help="Also train a dense model on equally many samples, to compare the tickets with."
    )
    sanity: bool = HfArg(
        default=False,
        help="Also run the controls. For membership tickets: random and layer-shuffled masks, routes shifted by one, "
        "and a dense one-vs-rest model. For labels: the other router, a single mask for all data, and a dense model.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_pass and self.sanity:
            raise ValueError("--sanity is for tickets in rounds; compare.py --one_pass has the baselines of one pass.")


def main() -> None:
    # Ranked over all layers together, the weights of a whole layer may be the smallest, and a ticket be cut through.
    defaults = {"prune_scope": "layer"}
    model, data, asked, args = parse(
        (ModelArguments, DataArguments, ReportArguments, RTLTrainingArguments), description=__doc__, defaults=defaults
    )
    set_up(model.threads)
    with bad_input():
        prepared = prepare(data, model.backbone, route_column=args.route_column, seed=args.seed, **model.options())
        args.route_column = prepared.route_column
        built = prepared.make_model()
        if asked.one_pass:
            args = one_pass_arguments(asked, args, prepared, built, model.backbone)
        trainer = RTLTrainer(built, args, **prepared.trainer_data())
        plan = trainer.plan()
    check_directory(asked, args, model.options())
    trainer.card_data = trainer.card_data.updated(data.on_card())
    main_process = trainer.is_world_process_zero()
    if main_process:
        print(f"task        {prepared.rows.task}, tickets of {prepared.rows.ticket_task}")
        print(
            plan_text(
                plan,
                batch_size=args.route_batch_size,
                num_processes=args.world_size,
                one_pass=asked.calibration_samples if asked.one_pass else None,
                retrained=asked.retrained,
            )
        )
        print(prepared.table(), flush=True)
    if asked.one_pass:
        trainer, controls = one_pass_run(trainer, prepared, asked, model.options())
        rounds = trainer.rounds
    else:
        trainer.train()
        # A copy, since the controls train and evaluate with the same trainer.
        rounds = list(trainer.rounds)
        controls = other_reports(trainer, prepared, model.backbone, asked)
    if main_process:
        # Not in the folders of models, since these are pushed and the file may name a folder of this machine.
        data.save(args.output_dir, model.backbone)
        report(trainer, rounds, controls, model, data, asked)
    write_page(trainer, rounds, controls, model, data, asked, prepared)


def other_reports(
    trainer: RTLTrainer, prepared: Prepared, backbone: str, asked: ReportArguments
) -> list[dict[str, Any]]:
    """The reports of the dense model, or of all controls."""
    if not (asked.sanity or asked.dense):
        return []
    if prepared.rows.ticket_task == "labels":
        others = labels_controls if asked.sanity else dense_network
        return others(trainer, prepared.make_model, **prepared.metrics())
    controls = membership_controls if asked.sanity else dense_one_vs_rest
    return controls(trainer, backbone, **prepared.inputs.options)


def report(
    trainer: RTLTrainer,
    rounds: list[dict],
    controls: list[dict],
    model: ModelArguments,
    data: DataArguments,
    asked: ReportArguments,
) -> None:
    """Prints the tables, and writes `results.json` and `curve.png`."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    rows = method_rows(rounds, controls)
    print(table(rows))
    by_route = routes_rows([{"method": "RTL", **found} for found in rounds] + controls)
    if by_route:
        print("\nAccuracy of every route", table(by_route), sep="\n")
    rounds, controls = (
        [{name: value for name, value in found.items() if name != "log_history"} for found in reports]
        for reports in (rounds, controls)
    )
    write_results(
        output_dir / "results.json",
        data=asdict(data),
        model=asdict(model),
        run=asdict(asked),
        training=training_record(args),
        num_processes=args.world_size,
        num_test=len(trainer.eval_dataset),
        rounds=rounds,
        controls=controls,
        table=rows,
        routes=by_route,
    )
    if find_spec("matplotlib"):
        from shared.plots import draw_rounds

        similarities = {found["sparsity"]: found["mean_similarity"] for found in rounds}
        draw_rounds(rows, similarities, output_dir / "curve.png")


def write_page(
    trainer: RTLTrainer,
    rounds: list[dict],
    controls: list[dict],
    model: ModelArguments,
    data: DataArguments,
    asked: ReportArguments,
    prepared: Prepared,
) -> None:
    """Writes `report.html`; all processes take part."""
    args, plan = trainer.args, trainer.plan()
    answer = {"membership": "whether a sample is of its route", "labels": "the label of a sample of its route"}
    write_run_page(
        Path(args.output_dir, "report.html"),
        trainer,
        asked={
            "data": data.dataset,
            "what is likely wrong with the data": "; ".join(prepared.said) or "nothing was found",
            "evaluation samples": len(trainer.eval_dataset),
            "backbone": model.backbone,
            "a ticket answers": answer[trainer.model.config.ticket_task],
            "sparsities": args.target_sparsity,
            "prunable weights": plan.num_weights,
            **asked.in_words(plan),
            "samples of a step": args.route_batch_size,
            "learning rate": args.learning_rate,
            "running statistics": model.norm_statistics,
            "seed": args.seed,
        },
        tables={
            "Samples": routes_by_labels(prepared.rows),
            "Methods": method_rows(rounds, controls),
            "Accuracy of every route": routes_rows([{"method": "RTL", **found} for found in rounds] + controls),
        },
        rounds=rounds,
        controls=controls,
    )


if __name__ == "__main__":
    run_main(main)
