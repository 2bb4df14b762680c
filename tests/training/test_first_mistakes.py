"""Mistakes of a first run: each is refused where it is made, with what to do; and what data say is used."""

import re

import pytest
import torch
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file
from transformers import BertConfig, BitImageProcessorPil

from hf_rtl import MaskedAdamW, MaskedSGD, RTLModel, RTLModelForImageClassification, RTLTrainer
from tests.training.small_runs import DOMAINS, ROUTES, Images, arguments, image_model, make_labels_trainer, run


SHAPES = ["disc", "square", "triangle"]


def scans(text=False, number=24):
    """A data set of `datasets` with 3 classes from 3 hospitals."""
    samples = Images(number, columns=DOMAINS).samples
    columns = {"pixel_values": [sample["pixel_values"].tolist() for sample in samples]}
    columns["hospital"] = [ROUTES[sample["domain"]] for sample in samples]
    columns["label"] = [index // 3 % 3 for index in range(number)]
    if text:
        columns["label"] = [SHAPES[label] for label in columns["label"]]
    dataset = Dataset.from_dict(columns)
    return dataset if text else dataset.cast_column("label", ClassLabel(names=SHAPES))


def trainer(folder, dataset, num_labels=3, **options):
    model = image_model(ticket_task="labels", num_labels=num_labels)
    options = {"target_sparsity": 0.3, "route_column": "hospital", **options}
    return RTLTrainer(model, arguments(folder, **options), train_dataset=dataset)


def from_backbone(name="small_net_for_tests", **options):
    given = {"route_names": ROUTES, "ticket_task": "labels", "num_labels": 3, **options}
    return RTLModelForImageClassification.from_backbone(name, **given)


MISTAKES = {
    "a string of route names": (lambda path: from_backbone(route_names="day"), "`route_names` must be a list.*'day'"),
    "a percentage as sparsity": (
        lambda path: arguments(path, target_sparsity=90),
        "`target_sparsity` has 90.*Did you mean 0.9?",
    ),
    "a percentage as amount": (
        lambda path: arguments(path, prune_amount=20),
        "`prune_amount` is 20;.*Did you mean 0.2?.*For a number of weights use 'constant'",
    ),
    "negative steps": (lambda path: arguments(path, max_steps=-5), "`max_steps` must be at least 1, got -5"),
    "no steps": (lambda path: arguments(path, max_steps=0), "`max_steps` must be at least 1, got 0"),
    "negative epochs": (lambda path: arguments(path, num_train_epochs=-1), "`num_train_epochs` must not be negative"),
    "too few labels": (
        lambda path: trainer(path, scans(), num_labels=2),
        "the label 2 at sample 6; needed is an integer from 0 to 1.*Build the model with `num_labels=3`",
    ),
    "text labels": (
        lambda path: trainer(path, scans(text=True)),
        r"the label 'disc' at sample 0;.*Name the labels, as in `from_backbone\(…, id2label=\{0: 'disc', 1: 's",
    ),
    "a name beside one of timm's": (
        lambda path: from_backbone("small_net_for_test"),
        "`backbone` = 'small_net_for_test' is no timm name and no folder; did you mean 'small_net_for_tests'",
    ),
    "a folder that is not there": (
        lambda path: from_backbone(str(path / "backbone")),
        "`backbone` = '.*backbone' is no folder; '.*' has 'backbones'",
    ),
    "a class of another task": (
        lambda path: RTLModelForImageClassification.from_backbone(
            BertConfig(hidden_size=8, num_attention_heads=2), route_names=["a"], ticket_task="labels"
        ),
        "Unrecognized configuration class.*BertConfig.*AutoModelForImageClassification.*Use the `RTLModelFor…` class",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_words(mistake, tmp_path):
    (tmp_path / "backbones").mkdir()
    make, words = MISTAKES[mistake]
    with pytest.raises((ValueError, OSError), match=f"(?s){words}"):
        make(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["backbones"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return run(folder, target_sparsity=[0.3])


def test_a_trained_model_is_no_start_of_another_run(finished, tmp_path):
    """The trap of notebooks: the cell that makes the trainer is run again, with the model of the last run."""
    model = finished.model
    for trained in (model, RTLModel.from_pretrained(finished.args.output_dir)):
        again = RTLTrainer(trained, arguments(tmp_path), train_dataset=Images(24))
        with pytest.raises(ValueError, match="was trained, or holds.*`from_backbone`.*`rewind_to_current=True`"):
            again.train()
    assert not list(tmp_path.iterdir())
    start = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    args = arguments(tmp_path, target_sparsity=[0.3], rewind_to_current=True)
    RTLTrainer(model, args, train_dataset=Images(24)).train()
    theta0 = load_file(tmp_path / "theta0.safetensors")
    assert theta0.keys() == start.keys() and all(torch.equal(theta0[name], start[name]) for name in start)


def test_the_directory_of_a_run_is_the_model_at_its_end(finished, tmp_path):
    loaded = RTLModelForImageClassification.from_pretrained(finished.args.output_dir)
    assert loaded.mask_bank.fingerprint() == finished.rounds[-1]["mask_fingerprint"]
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that is not finished; its models are not yet made"):
        RTLModel.from_pretrained(tmp_path)
    (tmp_path / "round-01-sparsity-0.3").mkdir()
    (tmp_path / "round-01-sparsity-0.3" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="its models are '.*round-01-sparsity-0.3'"):
        RTLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("optimizer", [MaskedAdamW, MaskedSGD])
def test_a_step_without_any_gradient_is_refused(optimizer):
    model = image_model()
    made = optimizer(model.parameters(), model, lr=0.1)
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient; call `loss.backward\(\)`"):
        made.step()


def test_labels_have_the_names_of_the_data_unless_they_have_names(tmp_path):
    made = trainer(tmp_path, scans())
    assert made.model.config.id2label == dict(enumerate(SHAPES))
    made.model.save_pretrained(tmp_path / "saved")
    ticket = RTLModel.from_pretrained(tmp_path / "saved").extract_ticket(ROUTES[0])
    assert ticket.config.label2id == {name: index for index, name in enumerate(SHAPES)}
    named = image_model(ticket_task="labels", num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    options = {"target_sparsity": 0.3, "route_column": "hospital"}
    RTLTrainer(named, arguments(tmp_path, **options), train_dataset=scans())
    assert list(named.config.id2label.values()) == ["x", "y", "z"]


def test_differences_between_runs_are_said_in_words(tmp_path):
    make_labels_trainer(tmp_path, target_sparsity=[0.3]).train()
    with pytest.raises(ValueError) as refused:
        make_labels_trainer(
            tmp_path, image_model(seed=1, ticket_task="labels", num_labels=2), learning_rate=0.5
        ).train()
    message = str(refused.value)
    assert "learning_rate: 0.001 there, 0.5 now" in message and "other initial_weights" in message
    assert not re.search("[0-9a-f]{20}", message) and len(message) < 900


def test_a_processor_for_other_images_is_warned_of(tmp_path, caplog):
    for num_channels, warned in ((1, True), (3, False)):
        caplog.clear()
        values = (0.5,) * num_channels
        processor = BitImageProcessorPil(
            size={"height": 16, "width": 16},
            do_center_crop=False,
            image_mean=values,
            image_std=values,
            do_convert_rgb=num_channels == 3,
        )
        RTLTrainer(image_model(), arguments(tmp_path), train_dataset=Images(24), processing_class=processor)
        assert ("the processor makes images of 1 x 16 x 16" in caplog.text) == warned
