"""
Evaluate saved models in a fresh process, from their folders and the data alone.

    python recipes/evaluate.py runs/digits/final
    python recipes/evaluate.py runs/digits/round-0* --compare runs/digits/results.json
    python recipes/evaluate.py model --dataset scans --route_column hospital     # a model that was made in Python

With --compare, the command exits with 1 unless every metric equals that in the file to the last digit. Use as many
processes as the run had: the loss is a mean over the batches of each process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from shared.arguments import BadInput, Parser, run_main
from shared.data_arguments import DataArguments
from shared.prepare import bad_input, prepare
from shared.report import row, table
from shared.rows import LABEL


# The arguments of a run that its metrics depend on.
_EVALUATED_WITH = ("per_device_eval_batch_size", "bf16", "fp16", "seed", "route_column")
_TIMINGS = ("runtime", "per_second", "epoch", "round", "preparation_time")


def main() -> None:
    parser = Parser([DataArguments], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in parser._actions:
        # Only what is given replaces what the run of a model had.
        action.default = argparse.SUPPRESS
    parser.add_argument("models", nargs="+", type=Path, help="folders of models")
    parser.add_argument("--route_column", help="column of the routes, of a model that was made in Python")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch decides")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="results.json to compare with")
    arguments = vars(parser.parse_args())
    models, route_column, threads, recorded = (
        arguments.pop(name) for name in ("models", "route_column", "threads", "compare")
    )
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    with bad_input():
        results = None if recorded is None else json.loads(recorded.read_text())
    evaluated = {folder.name: evaluate(folder, arguments, route_column) for folder in models}
    lines = [table([row(name, 1 - report["density"], report) for name, report in evaluated.items()])]
    differing: list[str] = []
    if results is not None:
        differing = compare(evaluated, results)
        names = f": {', '.join(differing[:5])}" if differing else ""
        lines.append(f"{len(differing)} of the recorded metrics differ{names}")
    if PartialState().is_main_process:
        print("\n".join(lines))
    sys.exit(bool(differing))


def evaluate(folder: Path, given: dict[str, Any] | None = None, route_column: str | None = None) -> dict[str, Any]:
    """
    The metrics of the model in `folder` on its test data, with its density and sizes for the table.

    Args:
        folder (`Path`): the model. Beside it lies the `data.json` of a run of `prune.py`, or its data are `given`.
        given (`dict`, *optional*): values of [`DataArguments`] that replace those of the run.
        route_column (`str`, *optional*): replaces the column of the training.

    Raises:
        BadInput: the data are not known, cannot be read, or do not fit the model.
    """
    given = given or {}
    beside = folder.absolute().parent
    if (beside / "data.json").exists():
        data, backbone = DataArguments.load(beside)
        # The processor in the folder has these already.
        data.image_size = data.mean = data.std = None
        vars(data).update(given)
    elif "dataset" in given:
        data, backbone = DataArguments(**given), str(folder)
    else:
        raise BadInput(
            f"{str(folder)!r} is no model of a run of prune.py, so its test data are not known: name them, as in "
            f"`evaluate.py {folder} --dataset FOLDER --route_column NAME`."
        )
    with bad_input():
        model = RTLModel.from_pretrained(folder)
        file = folder / "training_args.json"
        recorded = json.loads(file.read_text()) if file.exists() else {}
        saved = {name: recorded[name] for name in _EVALUATED_WITH if name in recorded}
        column = route_column or saved.get("route_column")
        data.ticket_task = data.ticket_task or model.config.ticket_task
        if data.ticket_task == "labels" and not data.class_names and "LABEL_0" not in model.config.label2id:
            # Labels have the ids that they have in the model.
            data.class_names = [name for _, name in sorted(model.config.id2label.items())]
        found = data.route_groups or data.cluster_routes or column == LABEL
        asked = None if found else column
        prepared = prepare(data, backbone, route_column=asked, seed=saved.get("seed", 0), processor=str(folder))
        with tempfile.TemporaryDirectory() as output_dir:
            args = RTLTrainingArguments(output_dir=output_dir, **{**saved, "route_column": prepared.route_column})
            served = {
                name: value
                for name, value in prepared.trainer_data().items()
                if name not in ("train_dataset", "partition")
            }
            metrics = RTLTrainer(model, args, **served).evaluate()
    return {
        "metrics": metrics,
        "density": float(model.mask_bank.density().mean()),
        "union": model.mask_bank.union_count(),
        "footprint": model.footprint(),
    }


def compare(evaluated: dict[str, dict[str, Any]], results: dict[str, Any]) -> list[str]:
    """Names of the metrics that differ from the recorded ones."""
    recorded = {report["folder"]: report["metrics"] for report in results["rounds"]}
    recorded["final"] = results["rounds"][-1]["metrics"]
    return [
        f"{folder}/{name}"
        for folder, report in evaluated.items()
        for name, value in recorded[folder].items()
        # A metric of a route without test samples is NaN, which differs from itself.
        if not name.endswith(_TIMINGS) and repr(report["metrics"].get(name)) != repr(value)
    ]


if __name__ == "__main__":
    run_main(main)
