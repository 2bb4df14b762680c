"""
Tickets in one pass for languages: a small language model of bytes, trained once, then a ticket for each language.

    python recipes/languages.py --config recipes/configs/languages.yaml --dataset FOLDER
    python recipes/languages.py --dataset FOLDER --seeds 0 --training_steps 500 --sparsity 0.5

FOLDER has parquet files train and test with texts and their languages. The model is a Llama of bytes. It is trained on
all languages, without masks. Then whole neurons of its feed-forward layers are removed, without training, and each row
of the table is a method, always with as many neurons:

- `one mask`: the same neurons for all languages, chosen on as many texts of every language;
- `one mask at the union's density`: as many neurons as at least one ticket keeps;
- `tickets`: neurons chosen for each language on its own texts, by activity;
- `random tickets`, `another route's tickets`: what the choice is worth;
- `+ refit`: the weights that read the neurons are solved anew, on the texts of all languages for one mask, or of each.

The quality is bits per byte of the test texts. Time and active weights are those of one call of the extracted models,
the bytes those that are stored for all languages. The command prints tables, writes them into `results.json` in
--output_dir, and draws there each ticket on each language. Repeated, it reads back the trained models and the
seeds that are finished.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup, set_seed
from transformers.hf_argparser import HfArg

from shared.arguments import parse, run_main, set_up
from shared.data_arguments import DataArguments
from shared.one_pass import (
    TICKETS,
    OnePass,
    average,
    balanced,
    compare,
    costs,
    finish,
    middle,
    of_seeds,
    ticket_against_data,
)
from shared.read_data import read_splits


BITS = "bits per byte"


@dataclass
class LanguageArguments:
    """The model, its training, and how tickets are found."""

    output_dir: str = HfArg(default="runs/languages", help="Folder of models, results and pictures.")
    route_column: str = HfArg(default="language", help="Column of the languages, which are the routes.")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "For weights, batches and texts."})
    num_layers: int = HfArg(default=3, help="Layers of the model.")
    width: int = HfArg(default=96, help="Width of the model; a layer has 8/3 times as many neurons.")
    window: int = HfArg(default=128, help="Bytes of a sample.")
    training_steps: int = HfArg(default=2000, help="Steps of 16 samples.")
    learning_rate: float = HfArg(default=4e-3, help="Largest learning rate; it falls to zero along a cosine.")
    sparsity: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.7], metadata={"help": "Shares of the neurons that are removed."}
    )
    calibration_windows: int = HfArg(default=96, help="Samples of each language on which neurons are chosen.")
    test_windows: int = HfArg(default=64, help="Test samples of each language.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")


def main() -> None:
    arguments, data = parse(
        (LanguageArguments, DataArguments), description=__doc__, defaults={"input_column": "text", "max_length": None}
    )
    set_up(arguments.threads)
    columns = {"input_column": data.input_column, "route_column": arguments.route_column}
    train, test = (as_windows(split, columns, arguments.window) for split in read_splits(data, columns))
    names = sorted(set(train["route"]))
    tested = balanced(test, arguments.test_windows, seed=0)
    rows, routes = torch.tensor(tested["input_ids"][:]), np.array(tested["route"])
    windows = {name: rows[routes == name] for name in names}

    def quality(network: PreTrainedModel, name: str) -> dict[str, float]:
        return {BITS: bits_per_byte(network, windows[name])}

    output_dir = Path(arguments.output_dir)
    given = {
        "data": {**asdict(data), "dataset": Path(data.dataset).name},
        "arguments": {name: value for name, value in asdict(arguments).items() if name != "output_dir"},
    }

    def compared(seed: int) -> dict[str, Any]:
        model = trained_model(train, arguments, seed)
        calibration = balanced(train, arguments.calibration_windows, seed)
        options = {"batch_size": 16, "num_batches": math.ceil(arguments.calibration_windows / 16), "seed": seed}
        reports, matrix = [], None
        for sparsity in arguments.sparsity:
            served = list(OnePass(model, calibration, names, sparsity, options).serve())
            for report in compare(served, names, quality, {"input_ids": windows[names[0]][:8]}, sparsity):
                reports.append(report)
                print(f"seed {seed}, {report['method']}, {sparsity:.0%}: {average(report, BITS):.3f}", flush=True)
            if sparsity == middle(arguments.sparsity):
                matrix = ticket_against_data(dict(served)[TICKETS], names, quality, BITS).tolist()
        found_in = costs(model, calibration, middle(arguments.sparsity), options)
        return {"reports": reports, "costs": found_in, "matrix": matrix}

    results = of_seeds(output_dir, arguments.seeds, given, compared)
    matrix = np.mean([result["matrix"] for result in results], axis=0)
    draw_matrix(matrix, names, output_dir / "tickets-against-data.png")
    finish(output_dir, arguments.seeds, results, {BITS: max}, **given, pictures=["tickets-against-data.png"])


def as_windows(split: Dataset, columns: dict[str, str], window: int) -> Dataset:
    """Samples of `window` bytes, which hold the texts of one language one after the other."""
    texts: dict[str, list[bytes]] = {}
    for text, route in zip(split[columns["input_column"]], split[columns["route_column"]], strict=True):
        texts.setdefault(str(route), []).append(text.encode())
    parts = []
    for route, pieces in texts.items():
        joined = np.frombuffer(b"\n".join(pieces), dtype=np.uint8)
        rows = joined[: len(joined) // window * window].reshape(-1, window)
        parts.append((rows, [route] * len(rows)))
    rows = np.concatenate([part for part, _ in parts]).astype(np.int64)
    return Dataset.from_dict({"input_ids": rows, "route": [route for _, names in parts for route in names]})


def trained_model(train: Dataset, arguments: LanguageArguments, seed: int) -> PreTrainedModel:
    """The model of a seed, trained on all languages or read back from `output_dir/seed-N`."""
    folder = Path(arguments.output_dir) / f"seed-{seed}"
    if (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.width,
        intermediate_size=8 * arguments.width // 3,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=4,
        max_position_embeddings=arguments.window,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, arguments.training_steps)
    rows = torch.from_numpy(np.array(train.with_format("numpy")["input_ids"][:]))
    for step in range(arguments.training_steps):
        batch = rows[torch.randint(len(rows), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0:
            print(f"seed {seed}, step {step}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """The mean over all bytes but the first of each window, `int64 [num_windows, window]`."""
    model.eval()
    losses = [
        cross_entropy(model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        for rows in windows.split(32)
    ]
    return float(torch.cat(losses).double().mean()) / math.log(2)


def draw_matrix(matrix: np.ndarray, names: list[str], file: Path) -> None:
    """Draws what the ticket of each row costs on the data of each column, beside the best ticket for these data."""
    from matplotlib.figure import Figure

    from hf_rtl.plots import save_png

    costs = matrix - matrix.min(axis=0)
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(costs, cmap="viridis_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("data")
    axes.set_ylabel("ticket")
    for row in range(len(names)):
        for column in range(len(names)):
            dark = costs[row, column] > costs.max() / 2
            axes.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", color="w" if dark else "k")
    figure.colorbar(image, label="bits per byte more than the best ticket")
    save_png(figure, file)


if __name__ == "__main__":
    run_main(main)
