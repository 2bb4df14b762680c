"""The arithmetic of the benchmarks, on small cases; the measured times are not tested."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import mixed_batch, scaling, timing
from hf_rtl import RTLModelForImageClassification
from pages import card


def test_ratios_are_of_medians_and_quartiles_of_turns() -> None:
    times, floor = [2.0, 9.0, 3.0, 4.0, 8.0], [1.0, 3.0, 3.0, 1.0, 4.0]
    ratio, quartiles = timing.ratio(times, floor)
    assert ratio == 4 / 3
    low, _, high = statistics.quantiles([2.0, 3.0, 1.0, 4.0, 2.0], n=4)
    assert quartiles == f"{low:.3f}-{high:.3f}"


def test_steps_take_turns_and_the_first_do_not_count() -> None:
    called: list[str] = []
    steps = {"one": lambda: called.append("one"), "two": lambda: called.append("two")}
    times = timing.in_turn(steps, torch.device("cpu"), turns=2)
    assert called == ["one", "two"] * (timing.WARM_UP + 2)
    assert [len(values) for values in times.values()] == [2, 2]


def test_mixed_batches_are_measured_against_the_plain_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b", "c"], ticket_task="labels", num_labels=4, seed=0
    )
    inputs = {"pixel_values": torch.randn(12, 3, 16, 16), "labels": torch.arange(12) % 4}
    seen: list[set[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs["route_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(mixed_batch, "NUMS_IN_BATCH", (1, 3))
    monkeypatch.setattr(mixed_batch, "cases", lambda density: [("small", model, inputs)])
    file = tmp_path / "mixed_batch-results.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/mixed_batch.py", "--turns", "2", "--output", str(file)])
    mixed_batch.main()
    assert seen == [{0}, {0, 1, 2}] * 2 * 5
    results = json.loads(file.read_text())
    command = f"PYTHONPATH=recipes python -m benchmarks.mixed_batch --turns 2 --output {file}"
    assert results["command"] == command
    assert [line["routes in it"] for line in results["figures"]] == [1, 3]
    assert all(
        line[f"{kind} ratio"] > 0 for line in results["figures"] for kind in ("inference", "forward and backward")
    )
    printed = capsys.readouterr().out
    assert all(f"{line['inference ratio']:.3f}" in printed for line in results["figures"])

    shutil.copytree(card.MODEL_CARDS / "templates", tmp_path / "templates")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    assert f"{results['figures'][1]['inference ratio']:.3f}" in card.render("mixed_batch")


@pytest.mark.long
@pytest.mark.slow
def test_scaling_compares_one_process_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measured runs are in this process here, where every clock goes half as fast for two processes."""

    def start(command: list[str], env: dict[str, str], check: bool) -> None:
        folder = Path(command[-1])
        scaling.measure(*parsed, folder)
        if "torch.distributed.run" in command:
            assert command[command.index("--nproc_per_node") + 1] == "2"
            measured = json.loads((folder / "measured.json").read_text())
            seconds = measured["extraction_seconds"] / 2
            (folder / "measured.json").write_text(
                json.dumps({**measured, "processes": 2, "extraction_seconds": seconds})
            )

    file = tmp_path / "scaling-results.json"
    arguments = (
        *("--dataset", "digits", "--num_channels", 1, "--backbone", "test_resnet", "--route_batch_size", 40),
        *("--max_train_samples", 400, "--turns", 1, "--extraction_steps", 1, "--retraining_steps", 12),
        *("--output", file),
    )
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, arguments)])
    parsed = scaling.parse((scaling.ScalingArguments, scaling.DataArguments), description="", defaults=scaling.CIFAR10)
    monkeypatch.setattr(scaling.subprocess, "run", start)
    monkeypatch.setattr(scaling.Extraction, "run", scaling.Extraction.run)  # The measured runs replace it.
    scaling.main()
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert [entry["processes"] for entry in results["measured"]] == [1, 2]
    assert len({entry["masks"] for entry in results["measured"]}) == 1
    assert all(entry[name] > 0 for entry in results["measured"] for name in ("extraction_seconds", "startup_seconds"))
    extraction = results["figures"][1]
    assert extraction["ratio"] == pytest.approx(extraction["1 process"] / extraction["2 processes"])

    shutil.copytree(card.MODEL_CARDS / "templates", tmp_path / "templates")
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    rendered = card.render("scaling")
    assert results["masks"] in rendered and results["masks"] in printed
    assert f"{extraction['ratio']:.3f}" in rendered
