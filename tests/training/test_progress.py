"""What a run prints: losses and metrics, what extraction finds, where it goes on from, and a table at the end."""

import io
import logging
import sys
from collections import Counter

import numpy as np
import pytest
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import EmptyTqdm

from hf_rtl import Partition
from hf_rtl.training.evaluation import chance_levels
from hf_rtl.training.progress import RunProgress
from hf_rtl.training.result_table import result_table
from tests.training.small_runs import ROUTES, image_model, make_labels_trainer


SPOKEN = {"disable_tqdm": False, "target_sparsity": [0.3, 0.6], "logging_steps": 2}


class Interrupt(TrainerCallback):
    """Ctrl-C after some steps of a joint retraining."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The trainers and the prints of a run that Ctrl-C stops, and of the same run continued."""
    folder, prints = tmp_path_factory.mktemp("spoken"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_rtl.training.progress.tqdm.write", lambda *arguments: prints.append(arguments[-1]))
        stopped = make_labels_trainer(folder, callbacks=[Interrupt()], save_strategy="steps", save_steps=1, **SPOKEN)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            stopped.train()
        before, prints[:] = list(prints), []
        made = make_labels_trainer(folder, save_strategy="steps", save_steps=1, **SPOKEN)
        made.train()
    return made, before, list(prints), interrupted


def test_losses_and_metrics_are_printed_as_by_trainer_without_those_of_routes(spoken):
    made, _, printed, _ = spoken
    lines = [eval(line) for line in printed if line.startswith("{")]
    logged = [{name: value for name, value in logs.items() if name != "step"} for logs in made.state.log_history]
    assert [line["loss"] for line in lines if "loss" in line][
        -1
    ] == f"{[x for x in logged if 'loss' in x][-1]['loss']:.4g}"
    evaluated = [line for line in lines if "eval_loss" in line]
    assert (
        len(evaluated) == 2 and evaluated[-1]["eval_accuracy"] == f"{made.rounds[-1]['metrics']['eval_accuracy']:.4g}"
    )
    assert not [name for line in lines for name in line if "/" in name]


def test_a_line_says_what_each_prune_event_found(spoken):
    made, before, printed, _ = spoken
    num_weights, events = made.model.mask_bank.num_weights, made.plan().rounds
    found = [line for line in printed if "prune event" in line]
    kept = [f"every ticket keeps {count:,} of {num_weights:,} weights" for round_ in events for count in round_.kept]
    assert len(found) == len(kept) and all(words in line for words, line in zip(kept, found, strict=True))
    bank = made.model.mask_bank
    others = [bank.similarity()[i, j] for i in range(3) for j in range(3) if i != j]
    assert found[-1].startswith("round 2/2 to 60%, prune event 2 of 2: ")
    assert f"similarity {sum(others) / 6:.3f} (by chance " in found[-1] and found[-1].endswith("no emptied layer")


@pytest.mark.slow
def test_emptied_layers_are_counted(tmp_path, capsys):
    make_labels_trainer(tmp_path, **SPOKEN | {"target_sparsity": [0.97], "allow_disconnected": True}).train()
    printed = capsys.readouterr().out
    assert "emptied layers ('" in printed


def test_ctrl_c_ends_in_words_and_the_run_says_where_it_goes_on(spoken):
    made, _, printed, interrupted = spoken
    assert str(interrupted.value).startswith(
        f"the run in {made.args.output_dir!r} was stopped. What is finished is kept"
    )
    assert interrupted.value.__suppress_context__ and len(interrupted.traceback) == 2  # the call, and `train`
    assert printed[0] == (
        f"the run in {made.args.output_dir!r} goes on: 3 of 9 masks are found, 0 of 2 joint retrainings are finished"
    )
    assert "joint retraining of round-01-sparsity-0.3 goes on from checkpoint-1" in printed


def test_the_table_has_every_route_at_every_sparsity_beside_chance(spoken):
    made, _, printed, _ = spoken
    table = next(line for line in printed if "by chance " in line and "\n" in line).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table if line and not line.startswith("-")}
    labels = [[sample["labels"] for sample in made.eval_dataset if sample["domain"] == route] for route in range(3)]
    for route, name in enumerate(made.model.route_names):
        chance = max(Counter(labels[route]).values()) / len(labels[route])
        figures = [report["metrics"][f"eval_{name}/accuracy"] for report in made.rounds]
        assert rows[name] == [f"{value:.3f}" for value in (chance, *figures)]
    assert rows["worst"] == [f"{report['metrics']['eval_worst_route_accuracy']:.3f}" for report in made.rounds]
    assert printed[-1] == f"\nthe model with its 3 tickets is in '{made.args.output_dir}/final'"


@pytest.mark.parametrize("silence", ["disable_tqdm", "logging", "other process"])
def test_silence_is_kept(tmp_path, capsys, monkeypatch, silence):
    logger = logging.getLogger("hf_rtl")
    before = logger.level
    options = {**SPOKEN, "target_sparsity": [0.3], "disable_tqdm": silence == "disable_tqdm"}
    try:
        logger.setLevel(logging.ERROR if silence == "logging" else before)
        if silence == "other process":
            monkeypatch.setattr("hf_rtl.RTLTrainingArguments.process_index", 1)
        made = make_labels_trainer(tmp_path, **options)
        made.remove_callback(transformers.PrinterCallback)
        monkeypatch.undo()
        made.train()
    finally:
        logger.setLevel(before)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


class NotebookProgressCallback(TrainerCallback):
    """The callback that is `Trainer`'s in a notebook, where it shows losses and metrics in a table."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.columns = list(metrics)


def test_a_notebook_has_the_table_of_transformers_and_no_lines_of_metrics(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    made = make_labels_trainer(tmp_path, **SPOKEN)
    (notebook,) = [one for one in made.callback_handler.callbacks if isinstance(one, NotebookProgressCallback)]
    metrics = made.evaluate()
    assert "eval_ant/accuracy" in metrics
    assert notebook.columns == [name for name in metrics if "/" not in name]
    made.state.is_world_process_zero = True
    made.progress.start(10)
    made.log({"loss": 1.0})
    made.progress.finish()
    assert "loss" not in capsys.readouterr().out


class Screen(io.StringIO):
    """A file that may be a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch):
    drawn = {}
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr", Screen(is_terminal))
        progress = RunProgress(["a"], show=True, prints_logs=True)
        progress.start(7)
        progress.begin_round("round 1/1 to 50%")
        progress.begin_route("a", 1, 2)
        progress.step(7)
        progress.finish()
        drawn[is_terminal] = sys.stderr.getvalue()
    assert drawn[False] == "" and "7/7" in drawn[True] and "round 1/1 to 50% · extraction 1/2 · a" in drawn[True]


def test_membership_tickets_have_balanced_accuracies_and_other_tasks_their_metrics():
    metrics = {"eval_a/balanced_accuracy": 0.75, "eval_b/balanced_accuracy": 0.5, "eval_balanced_accuracy": 0.625}
    metrics |= {"eval_worst_balanced_accuracy": 0.5, "eval_runtime": 3.0, "eval_loss": 0.1}
    table = result_table([{"sparsity": 0.5, "metrics": metrics}], ["a", "b"], chance={"a": 0.5, "b": 0.5})
    assert [line.split() for line in table.splitlines() if "-" not in line] == [
        ["balanced", "accuracy", "at", "sparsity", "by", "chance", "50%"],
        ["a", "0.500", "0.750"],
        ["b", "0.500", "0.500"],
        ["mean", "0.500", "0.625"],
        ["worst", "0.500"],
    ]
    losses = [{"sparsity": 0.25, "metrics": {"test_loss": 0.2, "test_f1": 0.5, "epoch": 1.0, "test_runtime": 2.0}}]
    table = result_table(losses, ["a", "b"], prefix="test_")
    assert [line.split() for line in table.splitlines()[2:]] == [["test_loss", "0.200"], ["test_f1", "0.500"]]


def test_a_round_to_sparsity_0_is_the_dense_model():
    reports = [{"sparsity": sparsity, "metrics": {"eval_a/accuracy": 0.5}} for sparsity in (0.0, 0.5)]
    assert result_table(reports, ["a"]).splitlines()[0].split() == [
        "accuracy",
        "at",
        "sparsity",
        "0%",
        "(dense)",
        "50%",
    ]


def test_of_many_routes_the_worst_are_shown():
    names = [f"r{route}" for route in range(30)]
    metrics = {f"eval_{name}/accuracy": 1 - route / 30 for route, name in enumerate(names)}
    table = result_table([{"sparsity": 0.5, "metrics": metrics}], names)
    shown = [line.split()[0] for line in table.splitlines() if line.startswith("r")]
    assert shown == names[:9:-1] and "(10 better routes)" in table


def test_tensorboard_has_one_log_of_all_rounds_with_the_metrics_of_routes_in_groups(tmp_path):
    made = make_labels_trainer(tmp_path, report_to=["tensorboard"], target_sparsity=[0.3, 0.6])
    made.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    assert folder.parent == tmp_path / "runs"
    log = EventAccumulator(str(folder))
    log.Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    for name in made.model.route_names:
        expected = [report["metrics"][f"eval_{name}/accuracy"] for report in made.rounds]
        assert [event.value for event in log.Scalars(f"eval/{name}/accuracy")] == pytest.approx(expected)


class Tracker(TensorBoardCallback):
    """Ends its log as trackio and MLflow do, and writes none."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, **kwargs):
        self.events.append("log")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


@pytest.mark.slow
def test_a_tracker_ends_its_log_with_the_run(tmp_path):
    tracker = Tracker()
    make_labels_trainer(tmp_path, callbacks=[tracker], target_sparsity=[0.3, 0.6]).train()
    assert tracker.events.count("begin") == 2 and tracker.events.index("end") == len(tracker.events) - 1
    tracker.on_train_end(None, None, None)
    assert tracker.events[-2:] == ["end", "end"]


class Bars(TrainerCallback):
    """Keeps the bar that transformers would draw at the start of a joint retraining."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = transformers.utils.logging.tqdm(range(3))


def test_transformers_draws_no_bars_within_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    bars = Bars()
    make_labels_trainer(tmp_path, callbacks=[bars], max_steps=1).train()
    assert isinstance(bars.bar, EmptyTqdm) and list(bars.bar) == [0, 1, 2]
    after = transformers.utils.logging.tqdm(range(3), disable=True)
    assert not isinstance(after, EmptyTqdm)


@pytest.mark.parametrize("names", [None, ["no", "yes"]])
def test_chance_is_the_share_of_the_commonest_label_of_a_route(names):
    labels, routes = [0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1]
    samples = [{"label": label if names is None else names[label]} for label in labels]
    model = image_model(ticket_task="labels", num_labels=2)
    found = chance_levels(model, samples, Partition(np.array(routes), ROUTES, allow_empty=True))
    assert found["ant"] == 2 / 3 and found["bee"] == 3 / 5 and np.isnan(found["cat"])
    regression = image_model(ticket_task="labels", num_labels=1)
    assert chance_levels(regression, samples, Partition(np.array(routes), ROUTES, allow_empty=True)) is None
