"""
The first half hour of a new user: what is typed, and what must then be on the screen.

These jobs are here: scans of three hospitals from Python, a run with the default prints, the same cell once
more, pipelines with the classes' names, a model that is evaluated elsewhere, and the shell on what Python made. The
others are in

- `tests/cli/test_export_card_push_and_tickets.py`: a graph of the saved processor's size; tickets dropped and added
  with the rule;
- `tests/training/test_first_mistakes.py`: the model of the last run given to a new one, and about 30 other mistakes;
- `tests/training/test_progress.py`: Ctrl-C and what a continued run says, silence, TensorBoard;
- `tests/recipes/test_prune.py`: recipes, what stops them and `evaluate.py`;
- `tests/test_docs.py`: everything that the documentation says to type, such as an own loop with accelerate.
"""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import transformers
from datasets import ClassLabel, Dataset
from PIL import Image
from transformers import pipeline

from hf_rtl import RTLModel
from hf_rtl_cli.main import main
from tests.training.small_runs import SMALL_NET


SHAPES = ["disc", "square", "triangle"]
HOSPITALS = ["north", "south", "west"]
# In these cells `train`, `test` and `scan` are there already.
DATA = """
from transformers import ViTImageProcessor

processor = ViTImageProcessor(size={"height": 16, "width": 16})


def prepare(batch):
    pixel_values = processor(batch["image"], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixel_values, "label": batch["label"], "hospital": batch["hospital"]}


train, test = train.with_transform(prepare), test.with_transform(prepare)
"""
RUN = f"""
from hf_rtl import RTLTrainer, RTLTrainingArguments, get_rtl_model

model = get_rtl_model("{SMALL_NET}", train, route_column="hospital")
args = RTLTrainingArguments(
    "run",
    target_sparsity=[0, 0.5],
    prune_amount=0.5,
    extraction_steps=2,
    max_steps=4,
    learning_rate=2e-3,
    logging_steps=2,
    eval_strategy="steps",
    eval_steps=2,
    route_batch_size=9,
)
trainer = RTLTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=processor)
trainer.train()
"""
ASK = """
from hf_rtl import routed_pipeline

classifier = routed_pipeline("image-classification", "run")
one = classifier(scan, route_ids="west")
each = classifier([scan, scan, scan], route_ids=["west", "north", "south"])
"""
EVALUATE = """
from hf_rtl import RTLModel, RTLTrainer, RTLTrainingArguments

model = RTLModel.from_pretrained("run")
args = RTLTrainingArguments("evaluation", route_column="hospital")
evaluated = RTLTrainer(model, args, eval_dataset=test).evaluate()
"""


def scans(number, seed):
    """Images of three shapes from three hospitals."""
    pixels = np.random.default_rng(seed).integers(0, 100, (number, 16, 16, 3), dtype=np.uint8)
    labels = [index // 3 % 3 for index in range(number)]
    for image, label in zip(pixels, labels, strict=True):
        image[4 * label : 4 * label + 5] += 120
    columns = {
        "image": [Image.fromarray(image) for image in pixels],
        "hospital": [HOSPITALS[index % 3] for index in range(number)],
        "label": labels,
    }
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=SHAPES))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """`notebook(cell)` runs a cell among the earlier ones, in a folder of its own, and returns what it prints."""
    names = {"train": scans(54, 0), "test": scans(27, 1), "scan": scans(1, 2)[0]["image"]}

    def run(cell):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            exec(cell, names)
        return out.getvalue()

    run.names = names
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()  # the default, under which a run speaks
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("notebook"))
        run(DATA)
        run.printed = run(RUN)
        yield run
    transformers.utils.logging.set_verbosity(verbosity)


def table(printed):
    """The rows of the table at the end of a run: name -> cells."""
    rows = [re.split("  +", line.strip()) for line in printed.split("accuracy at sparsity")[1].splitlines()]
    return {row[0]: row[1:] for row in rows if row[0] in (*HOSPITALS, "mean", "worst")}


@pytest.mark.slow
def test_every_choice_is_said_in_a_line(notebook):
    assert notebook.printed.splitlines()[:5] == [
        "routes       3, of column 'hospital': north, south, west",
        "ticket_task  'labels', since the label is another column than the route",
        "model_class  RTLModelForImageClassification",
        "labels       3, of column 'label': disc, square, triangle",
        "seed         0, of the weights that are not loaded",
    ]


def test_losses_metrics_and_events_are_lines_without_bars(notebook):
    lines = notebook.printed.splitlines()[5:]
    kinds = [
        next(
            kind
            for kind in ("prune event", "'eval_loss'", "'train_loss'", "'loss'", "accuracy at", "")
            if kind in line
        )
        for line in lines
    ]
    of_a_round = ["'loss'", "'eval_loss'"] * 2 + ["'train_loss'", "'eval_loss'"]
    assert kinds[: kinds.index("")] == [*of_a_round, "prune event", *of_a_round]
    assert "%|" not in notebook.printed and "shard" not in notebook.printed


def test_the_table_has_hospitals_beside_chance_and_the_dense_model(notebook):
    header = next(line for line in notebook.printed.splitlines() if "at sparsity" in line)
    assert re.split("  +", header) == ["accuracy at sparsity", "by chance", "0% (dense)", "50%"]
    rows = table(notebook.printed)
    assert list(rows) == [*HOSPITALS, "mean", "worst"]
    for name in HOSPITALS:
        measured = [report["metrics"][f"eval_{name}/accuracy"] for report in notebook.names["trainer"].rounds]
        assert rows[name] == ["0.333", *(f"{value:.3f}" for value in measured)]
    assert notebook.printed.splitlines()[-1] == "the model with its 3 tickets is in 'run/final'"


@pytest.mark.slow
def test_the_same_cell_again_trains_nothing_and_shows_the_table(notebook):
    again = notebook(RUN)
    assert "'loss'" not in again
    assert "2 of 2 joint retrainings are finished" in again and table(again) == table(notebook.printed)


def test_pipelines_answer_with_the_names_of_classes_through_a_hospital(notebook):
    notebook(ASK)
    one, each = notebook.names["one"], notebook.names["each"]
    assert sorted(answer["label"] for answer in one) == SHAPES and each[0] == one and each[1] != one
    with pytest.raises(ValueError, match="`route_ids='north'`, of 'north', 'south', 'west'.*`hf_rtl.routed_pipeline`"):
        pipeline("image-classification", model="run/final")(notebook.names["scan"])


def test_a_model_is_evaluated_where_it_was_not_trained(notebook):
    notebook(EVALUATE)
    trained = notebook.names["trainer"].rounds[-1]["metrics"]
    evaluated = notebook.names["evaluated"]
    assert [evaluated[f"eval_{name}/accuracy"] for name in HOSPITALS] == [
        trained[f"eval_{name}/accuracy"] for name in HOSPITALS
    ]


def test_the_shell_reads_what_python_made(notebook, capsys):
    assert main(["inspect", "run"]) == 1
    assert "'run/final'" in capsys.readouterr().err
    assert main(["inspect", "run/final"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in HOSPITALS) and "'hospital'" in printed
    assert main(["similarity", "run/final", "--json"]) == 0
    similarity = json.loads(capsys.readouterr().out)
    model = RTLModel.from_pretrained("run")
    assert similarity["routes"] == model.route_names
