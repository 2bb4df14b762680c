"""
Evaluate saved models in a fresh process, from their folders and the data alone.

    python recipes/evaluate.py runs/digits/final
    python recipes/evaluate.py runs/digits/round-0* --compare runs/digits/results.json

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
from transformers import AutoTokenizer

from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments
from shared.data_arguments import DataArguments
from shared.image_data import load_images
from shared.report import row, table
from shared.text_data import load_text


# The arguments of a run that its metrics depend on.
_EVALUATED_WITH = ("per_device_eval_batch_size", "bf16", "fp16", "seed", "route_column")
_TIMINGS = ("runtime", "per_second", "epoch", "round", "preparation_time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of models, inside the folder of a run")
    parser.add_argument("--dataset", help="folder or name of the same data, if they were moved")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch decides")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="results.json to compare with")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    evaluated = {folder.name: evaluate(folder, arguments.dataset) for folder in arguments.models}
    lines = [table([row(name, 1 - report["density"], report) for name, report in evaluated.items()])]
    differing: list[str] = []
    if arguments.compare is not None:
        differing = compare(evaluated, json.loads(arguments.compare.read_text()))
        names = f": {', '.join(differing[:5])}" if differing else ""
        lines.append(f"{len(differing)} of the recorded metrics differ{names}")
    if PartialState().is_main_process:
        print("\n".join(lines))
    sys.exit(bool(differing))


def evaluate(folder: Path, dataset: str | None) -> dict[str, Any]:
    """
    The metrics of the model in `folder` on its test data, with its density and sizes for the table.

    Raises:
        SystemExit: the model is not in the folder of a run of `prune.py`, which says what the test data are.
    """
    missing = [
        file for file in (folder.absolute().parent / "data.json", folder / "training_args.json") if not file.exists()
    ]
    if missing:
        raise SystemExit(
            f"{missing[0]} is missing, which recipes/prune.py writes at its end: evaluate.py takes the models of its "
            "runs, such as runs/digits/final. For a model that was made in Python: "
            f"RTLTrainer(RTLModel.from_pretrained({str(folder)!r}), RTLTrainingArguments(output_dir='evaluation'), "
            "eval_dataset=test).evaluate(), with the route_column of its training"
        )
    model = RTLModel.from_pretrained(folder)
    data = DataArguments.load(folder.absolute().parent)
    data.dataset = dataset or data.dataset
    saved = json.loads((folder / "training_args.json").read_text())
    if data.text_column is None:
        tokenizer, (_, test) = None, load_images(data, seed=saved["seed"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        _, test = load_text(data, tokenizer, route_column=saved["route_column"], seed=saved["seed"])
    with tempfile.TemporaryDirectory() as output_dir:
        args = RTLTrainingArguments(output_dir=output_dir, **{name: saved[name] for name in _EVALUATED_WITH})
        metrics = RTLTrainer(model, args, eval_dataset=test, processing_class=tokenizer).evaluate()
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
        if not name.endswith(_TIMINGS) and report["metrics"].get(name) != value
    ]


if __name__ == "__main__":
    main()
