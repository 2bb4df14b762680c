"""The arithmetic of the benchmarks, on small cases; the measured times are not tested."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig

from benchmarks import __main__ as everything
from benchmarks import cases, child, ends, gpu, growth, scaling, serving, timing, training
from benchmarks.cases import Case
from benchmarks.timing import Times
from hf_rtl import MaskBank
from hf_rtl.training.ticket_trainer import TicketTrainer
from pages import benchmarks as page
from pages import card


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_IN_TURN", 1e-12)


def in_this_process(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    return json.loads(json.dumps(function(**json.loads(json.dumps(arguments)))))


def without_clocks(steps: dict[str, Callable[[], object]], turns: int) -> dict[str, Times]:
    """As `in_turn`, but takes every step once, and makes the times up."""
    for step in steps.values():
        step()
    return {name: Times([1.0, 2.0], [1.0, 2.0]) for name in steps}


TINY = Case("tiny", "test_resnet", (1, 3, 16, 16))
TINY_BERT = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=1000)


def test_ratios_are_of_medians_and_quartiles_of_turns() -> None:
    times, floor = [2.0, 9.0, 3.0, 4.0, 8.0], [1.0, 3.0, 3.0, 1.0, 4.0]
    ratio, quartiles = timing.ratio(times, floor)
    assert ratio == 4 / 3
    low, _, high = statistics.quantiles([2.0, 3.0, 1.0, 4.0, 2.0], n=4)
    assert quartiles == f"{low:.3f}-{high:.3f}"


def test_lines_say_which_aims_are_met_by_which_clock() -> None:
    ours = Times(process=[0.003, 0.004, 0.005], wall=[0.01, 0.01, 0.01])
    rival = Times(process=[0.002, 0.002, 0.002], wall=[0.02, 0.02, 0.02])
    line = timing.compare("a", ours, "b", rival, aim=2.0)
    assert (line["ours"], line["rival"], line["ratio"], line["ratio by the wall"]) == (4.0, 2.0, 2.0, 0.5)
    assert (line["result"], line["turns"]) == ("met", 3)
    assert timing.compare("a", ours, "b", rival, aim=1.9)["result"] == "missed"
    wall = timing.compare("a", ours, "b", rival, clock="wall")
    assert (wall["ours"], wall["ratio"], wall["result"]) == (10.0, 0.5, None)
    single = timing.alone("a", 5.0, "s", aim=3.0)
    assert list(single) == list(line) and single["result"] == "missed" and single["ratio"] is None


def test_steps_take_turns_and_the_first_do_not_count() -> None:
    called: list[str] = []
    steps = {"one": lambda: called.append("one"), "two": lambda: called.append("two")}
    times = timing.in_turn(steps, 2)
    assert called == ["one", "two"] * 4
    assert [(len(one.process), len(one.wall)) for one in times.values()] == [(2, 2)] * 2


def test_short_steps_are_repeated_and_slow_ones_get_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[int] = []

    def timed(step: Any, device: Any, repeats: int = 1) -> tuple[float, float]:
        repeated.append(repeats)
        return 1.0, 0.5

    monkeypatch.setattr(timing, "SECONDS_IN_TURN", 2.0)
    monkeypatch.setattr(timing, "timed", timed)
    times = timing.in_turn({"one": lambda: None}, 9, seconds=0.0)
    assert repeated == [1] + [4] * timing.FEWEST_TURNS == [1] + [4] * len(times["one"].process)


def test_random_bits_have_no_padding() -> None:
    bank = MaskBank([("a", (3, 5)), ("b", (16,))], ["x", "y"])
    cases.fill_with_random_bits(bank)
    bank.validate()
    assert 0 < bank.count().sum() < 62


@pytest.mark.slow
def test_routes_are_measured_against_tickets_that_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[dict[str, Any]] = []
    monkeypatch.setattr(
        serving, "in_turn", lambda steps, turns: compared.append(steps) or without_clocks(steps, turns)
    )
    monkeypatch.setattr(serving, "IN_TURN", 2)
    monkeypatch.setattr(serving, "IN_BATCH", 3)
    monkeypatch.setattr(serving, "answers", lambda call: torch.no_grad()(call))
    serving.one_sample(TINY, 2)
    (one,) = compared
    assert torch.equal(one["route"]().logits, one["ticket"]().logits)
    pairs = zip(one["routes"](), one["tickets"](), strict=True)
    assert all(torch.equal(ours.logits, rival.logits) for ours, rival in pairs)

    lines = serving.mixed_batch(Case("tiny", "test_resnet", (6, 3, 16, 16)), 2)
    assert [line["figure"].split(": ")[0].split("batch, ")[1] for line in lines][1:] == ["sorted", "shuffled"]
    shuffled = compared[-1]
    mixed = shuffled["mixed"]().logits
    apart = torch.cat([answer.logits for answer in shuffled["tickets"]()])
    torch.testing.assert_close(mixed.sum(0), apart.sum(0), rtol=1e-4, atol=1e-4)

    lines = serving.small_ticket(Case("tiny", TINY_BERT, (2, 4)), 2)
    assert [line["aim"] for line in lines] == [serving.AIM_HALF, serving.AIM_SMALL]
    small = compared[-1]
    assert torch.equal(small["route"]().logits, small["small"]().logits)
    assert not torch.equal(small["route"]().logits, small["dense"]().logits)


def test_groups_are_measured_against_adapters_where_peft_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    assert serving.adapters(2)["adapters"] == [] and "hf_rtl[bench]" in serving.adapters(2)["break_even"]
    asked: list[list[str]] = []

    def with_adapters(network: torch.nn.Module) -> Callable[..., None]:
        return lambda adapter_names, **inputs: asked.append(adapter_names)

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "with_adapters", with_adapters)
    monkeypatch.setattr(serving, "GROUP_SIZES", (1, 2))
    monkeypatch.setattr(serving, "GROUPS", Case("tiny", TINY_BERT, (serving.NUM_GROUPS, 4)))
    assert [line["samples in a group"] for line in serving.adapters(2)["adapters"]] == [1, 2]
    assert asked[-1] == [f"adapter {k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((1.5, 1.2, 0.9), "from groups of 4 samples on"),
        ((0.9, 0.8, 0.7), "from 1 on"),
        ((0.9, 0.8, 1.1), "up to the largest size measured, 4"),
        ((1.5, 0.9, 1.1), "up to the largest"),
    ],
)
def test_break_even_is_where_routes_stay_cheaper(ratios: tuple[float, ...], words: str) -> None:
    lines = [
        {"samples in a group": size, "routes / adapters": one} for size, one in zip((1, 2, 4), ratios, strict=True)
    ]
    assert words in serving.break_even(lines)


def test_runs_of_two_lengths_give_what_steps_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    number = training.difference(Times([5.0, 7.0], [6.0, 9.0]), Times([2.0, 3.0], [3.0, 3.0]))
    assert number == Times([3.0, 4.0], [3.0, 6.0])
    seconds = {"routed_run": 0.5, "plain_run": 0.25}
    clock = [0.0]
    for name in seconds:

        def run(case: Case, samples: Any, steps: int, name: str = name) -> None:
            clock[0] += 3.0 + steps * seconds[name]

        monkeypatch.setattr(training, name, run)
    monkeypatch.setattr(training, "dense_step", lambda network, inputs: lambda: clock.append(clock.pop() + 0.125))
    monkeypatch.setattr(timing.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    lines, constant = training.whole_run(training.Run(TINY, 2, aim=1.9), 2)
    assert [line["ratio"] for line in lines] == [2.0, 4.0, 2.0]
    assert [line["result"] for line in lines] == ["missed", None, None]
    assert constant == {"network": "tiny", "ours (s)": 3.0, "Trainer (s)": 3.0}


@pytest.mark.slow
def test_training_takes_the_steps_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"extraction": 0, "joint": 0, "plain": 0}

    def count(cls: type, method: str, kind: str) -> None:
        original = getattr(cls, method)

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            counted[kind] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, counting)

    monkeypatch.setattr(training, "NUM_SAMPLES", 60)
    case = Case("tiny", "test_resnet", (4, 3, 16, 16))
    count(TicketTrainer, "step", "extraction")
    count(training.RTLTrainer, "training_step", "joint")
    training.routed_run(case, training.Samples(case.shape), 6)
    count(training.Trainer, "training_step", "plain")
    training.plain_run(case, training.Samples(case.shape), 6)
    assert counted == {"extraction": 3, "joint": 3, "plain": 6}
    monkeypatch.setattr(training, "in_turn", without_clocks)
    lines = training.single_steps(case, 2)
    assert [line["aim"] for line in lines] == [1.05, None, 1.02, None, None]


@pytest.mark.slow
def test_growth_measures_models_that_another_process_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "in_child", in_this_process)
    monkeypatch.setattr(growth, "growing_case", lambda size: Case("tiny", "test_resnet", (2, 3, 16, 16)))
    monkeypatch.setattr(growth, "in_turn", without_clocks)
    for name, value in {
        "NUMS_OF_ROUTES": (2,),
        "MANY_ROUTES": 3,
        "SIZES": {},
        "BATCHES": (1, 2),
        "BATCH_CASES": (("tiny", "test_resnet", (3, 16, 16)),),
        "SIMILARITY": {"num_masks": 3, "num_layers": 2, "layer": 20},
        "MEMORY_ROUTES": 2,
        "MEMORY_STEPS": 1,
    }.items():
        monkeypatch.setattr(growth, name, value)
    found = growth.measure(2)
    assert [(line["routes"], "similarity (s)" in line) for line in found["growth"]] == [(2, True), (3, False)]
    assert found["growth"][0]["on disk (MiB)"] > found["growth"][0]["weights and packed bank (MiB)"] > 0
    names = [line["figure"] for line in found["figures"]]
    assert names[0] == "similarity of 3 masks of 40 weights" and len(names) == 4
    retraining, extraction = found["memory"]
    assert retraining["ratio"] == pytest.approx(retraining["peak (MiB)"] / retraining["sum (MiB)"])
    assert "masked copy" in retraining["holds (MiB)"] and "rewind" in extraction["holds (MiB)"]


@pytest.mark.parametrize("name", growth.SIZES)
def test_sizes_are_what_they_say(name: str) -> None:
    width, depth = growth.SIZES[name]
    assert 12 * width**2 * depth == pytest.approx(10 ** int(name.removeprefix("10^")), rel=0.1)
    assert growth.bert(width, depth).num_attention_heads * 64 == width


def test_a_child_runs_a_function_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess:
        assert command[1:3] == ["-m", "benchmarks.child"] and str(child.RECIPES) in env["PYTHONPATH"]
        module, function, arguments = command[3:]
        assert (module, function, json.loads(arguments)) == ("benchmarks.growth", "similarity", {"num_masks": 3})
        return subprocess.CompletedProcess(command, 0, stdout='some words\n{"seconds": 1.5}\n')

    monkeypatch.setattr(child.subprocess, "run", run)
    assert child.in_child(growth.similarity, num_masks=3) == {"seconds": 1.5}


def test_a_process_knows_its_memory() -> None:
    child.forget_peak()
    before = child.memory()
    block = torch.ones(2**24)  # more than the C library takes from memory that was freed before
    assert child.peak_memory() - before >= 0.9 * block.nbytes


@pytest.mark.slow
def test_starts_are_measured_in_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "OURS", ("import json",))
    monkeypatch.setattr(ends, "RIVALS", ("import json", "from pathlib import Path"))
    monkeypatch.setattr(ends, "HELP", "print('usage')")
    monkeypatch.setattr(ends, "tiny_run", lambda: {"first": 5.0, "again": 3.0, "Trainer": 2.0, "parts": []})
    monkeypatch.setattr(ends, "in_child", in_this_process)
    lines = ends.measure(2)["figures"]
    assert [line["unit"] for line in lines] == ["ms", *["s"] * 4]
    assert [(line["ours"], line["result"]) for line in lines[2:]] == [(5.0, "missed"), (3.0, None), (2.0, None)]


def test_time_of_a_part_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.5, 17.0, 20.0, 24.0])
    monkeypatch.setattr(ends.time, "process_time", lambda: next(clock))
    work = SimpleNamespace(inner=lambda: None)
    work.outer = lambda: (work.inner(), work.inner())
    monkeypatch.setattr(ends, "PARTS", (("outer", work, "outer"), ("inner", work, "inner"), ("never", work, "never")))
    work.never = None
    with ends.parts_timed() as seconds:
        work.outer()  # from 0 to 17, with the inner part from 1 to 3 and from 10 to 10.5
        work.inner()  # from 20 to 24
    assert seconds == {"outer": 14.5, "inner": 6.5, "never": 0.0}
    work.outer()  # the clock has no more times


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out == f"{gpu.NO_DEVICE}\n"


def test_waits_of_the_host_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    assert gpu.count_waits(step) == 3 and modes == ["warn", "default"]


def test_all_parts_make_one_file_and_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = timing.compare("it", Times([2.0, 2.0], [2.0, 2.0]), "that", Times([1.0, 1.0], [1.0, 1.0]), aim=1.5)
    tables = {
        "serving": {"adapters": [], "break_even": "Never."},
        "training": {"constant_cost": [{"network": "n", "ours (s)": 1.25}]},
        "growth": {"growth": [{"model": "m", "routes": 2}], "memory": [{"what": "w"}]},
        "ends": {"parts_of_a_run": [{"part": "p", "again (s)": 0.5}]},
        "gpu": {"synchronisations": []},
    }
    asked: list[dict[str, Any]] = []
    for name, part in everything.PARTS.items():
        figures = [{**line, "figure": f"{name} it"}] if name != "gpu" else []

        def measure(turns: int, figures: list = figures, name: str = name, **options: Any) -> dict[str, Any]:
            asked.append({"turns": turns, **options})
            return {"figures": figures, **tables[name]}

        monkeypatch.setattr(part, "measure", measure)
    file = tmp_path / "benchmarks-results.json"
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--turns", "2", "--output", str(file)])
    everything.main()
    assert asked == [{"turns": 2}, {"turns": 2}, {"turns": 2, "full": False}, {"turns": 2}, {"turns": 2}]
    results = json.loads(file.read_text())
    assert results["command"] == f"PYTHONPATH=recipes python -m benchmarks --turns 2 --output {file}"
    assert [line["part"] for line in results["figures"]] == ["serving", "training", "growth", "ends"]
    assert "missed" in capsys.readouterr().out
    text = page.render(results)
    assert "0 of 4 aims were met; missed: serving it; training it" in text and "Never." in text and "| 1.250" in text
    page.draw(results["figures"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000

    monkeypatch.setattr(sys, "argv", ["__main__.py", "--only", "ends,speed"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "'speed'" in capsys.readouterr().err


def test_the_page_of_benchmarks_follows_from_the_results() -> None:
    assert page.PAGE.read_text() == page.render(json.loads(page.RESULTS.read_text()))
    assert page.PICTURE.exists()


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
