"""The recipe of one-pass tickets for languages, on a few generated texts."""

import json
import math
import sys

import languages
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from shared.one_pass import DENSE, METHODS, ONE, TICKETS, TICKETS_REFIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of two languages that share no letter."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    alphabets = {"north": "abcdef", "south": "uvwxyz"}
    for split, number in (("train", 40), ("test", 12)):
        rows = [
            {"text": "".join(generator.choice(list(alphabets[name]), 150)), "language": name}
            for name in alphabets
            for _ in range(number)
        ]
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def run(folder, output_dir, *options):
    given = ["--dataset", folder, "--output_dir", output_dir, "--width", 16, "--num_layers", 1, "--window", 32]
    given += ["--training_steps", 30, "--calibration_windows", 32, "--test_windows", 8, "--sparsity", 0.5]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["languages.py", *map(str, [*given, *options])])
        languages.main()
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    return run(folder, output_dir, "--seeds", 0, 1), output_dir


@pytest.mark.slow
def test_tickets_stand_beside_all_that_they_must_be_compared_with(folder, compared):
    found, output_dir = compared
    assert [line["method"] for line in found["figures"]] == METHODS
    reports = {(report["seed"], report["method"]): report for report in found["reports"]}
    assert len(reports) == 2 * len(METHODS)
    texts = Dataset.from_parquet(str(folder / "test.parquet")).filter(lambda row: row["language"] == "north")["text"]
    joined = b"\n".join(text.encode() for text in texts)
    rows = [list(joined[start : start + 32]) for start in range(0, len(joined) - 31, 32)]
    drawn = sorted(np.random.default_rng(0).permutation(len(rows))[:8].tolist())
    for seed in (0, 1):
        of_seed = {method: reports[seed, method] for method in METHODS}
        # One layer with 42 neurons, each of two rows and a column of 16; 24 is the multiple of 8 nearest to a half.
        assert of_seed[DENSE]["active"] - of_seed[ONE]["active"] == (42 - 24) * 3 * 16
        assert of_seed[ONE]["active"] == of_seed[TICKETS]["active"] == of_seed[TICKETS_REFIT]["active"]
        assert of_seed[ONE]["bytes"] < of_seed[DENSE]["bytes"]
        assert all(report["faster"] == of_seed[DENSE]["ms"] / report["ms"] for report in of_seed.values())
        assert of_seed[TICKETS]["bytes"] < of_seed[TICKETS_REFIT]["bytes"]
        model = LlamaForCausalLM.from_pretrained(output_dir / f"seed-{seed}").eval()
        bits = []
        with torch.no_grad():
            for index in drawn:
                logits = model(input_ids=torch.tensor([rows[index]])).logits[0].double().log_softmax(-1)
                bits += [-float(logits[i, rows[index][i + 1]]) / math.log(2) for i in range(31)]
        assert of_seed[DENSE]["quality"]["north"]["bits per byte"] == pytest.approx(sum(bits) / len(bits), rel=1e-5)
    values = {key: [one["bits per byte"] for one in report["quality"].values()] for key, report in reports.items()}
    means = {key: sum(of_routes) / 2 for key, of_routes in values.items()}
    differences = [means[seed, TICKETS] - means[seed, ONE] for seed in (0, 1)]
    line = next(line for line in found["differences"] if line["method"] == f"{TICKETS} − {ONE}")
    spread = abs(differences[0] - differences[1]) / math.sqrt(2)
    assert line["bits per byte"] == f"{sum(differences) / 2:+.3f} ± {spread:.3f}"
    assert line["bits per byte: difference / spread"] == f"{abs(sum(differences)) / 2 / spread:.1f}"
    figures = next(line for line in found["figures"] if line["method"] == TICKETS)
    worst = [max(values[seed, TICKETS]) for seed in (0, 1)]
    assert figures["worst bits per byte"].startswith(f"{sum(worst) / 2:.3f} ± ")
    assert [line["method"] for line in found["costs"]] == [TICKETS, TICKETS_REFIT]
    assert (output_dir / "tickets-against-data.png").stat().st_size > 1000


@pytest.mark.slow
def test_trained_models_and_finished_seeds_are_read_back(folder, compared):
    first, output_dir = compared
    files = [output_dir / "seed-0" / "model.safetensors", output_dir / "seed-0.json"]
    before = [file.stat().st_mtime_ns for file in files]
    again = run(folder, output_dir, "--seeds", 0)
    assert [file.stat().st_mtime_ns for file in files] == before
    expected = [report for report in first["reports"] if report["seed"] == 0]
    assert again["reports"] == expected
    other = run(folder, output_dir, "--seeds", 0, "--test_windows", 4)
    assert [file.stat().st_mtime_ns > time for file, time in zip(files, before, strict=True)] == [False, True]
    assert [report["active"] for report in other["reports"]] == [report["active"] for report in expected]
    assert other["reports"][0]["quality"] != expected[0]["quality"]
