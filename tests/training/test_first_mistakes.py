"""Mistakes of a first run: each is refused where it is made, with what to do; and what data say is used."""

import re

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import BertConfig, BitImageProcessorPil, TrainingArguments

from hf_rtl import (
    MaskedAdamW,
    MaskedSGD,
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLTrainer,
    get_rtl_model,
)
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


def leave_out(sample, index):
    """Sample 4 has no label."""
    return {"label": -1 if index == 4 else sample["label"]}


IMAGES = torch.zeros(2, 3, 16, 16)


def labels_model(num_labels=3, **options):
    return image_model(ticket_task="labels", num_labels=num_labels, **options).eval()


def hospitals(folder, **options):
    return arguments(folder, **{"target_sparsity": 0.3, "route_column": "hospital", **options})


def trainer(folder, dataset, num_labels=3, **options):
    return RTLTrainer(labels_model(num_labels), hospitals(folder, **options), train_dataset=dataset)


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
    "a column that is nearly there": (
        lambda path: trainer(path, scans(), route_column="hospitel"),
        "`route_column` = 'hospitel' is not in the data set; .*'hospital', 'label'. Did you mean 'hospital'?",
    ),
    "the same before there is a trainer": (
        lambda path: get_rtl_model("small_net_for_tests", scans(), route_column="hospitel"),
        "`route_column` = 'hospitel' is not in the data set; .*'hospital', 'label'. Did you mean 'hospital'?",
    ),
    "no column that says the route": (
        lambda path: trainer(path, scans(), route_column=None),
        r"`route_column` is missing: .*another column must say the route, as in `RTLTrainingArguments\(route_column=",
    ),
    "data of other routes": (
        lambda path: RTLTrainer(labels_model(routes=["east", "west"]), hospitals(path), train_dataset=scans()),
        "Column 'hospital' has 'ant', 'bee', 'cat'; `route_names` allows 'east', 'west'",
    ),
    "all splits at once": (
        lambda path: trainer(path, DatasetDict(train=scans())),
        r"`dataset` is a `DatasetDict` of 'train'; pass one split, as in `dataset\['train'\]`",
    ),
    "a stream": (
        lambda path: trainer(path, scans().to_iterable_dataset()),
        "`dataset` is a `IterableDataset`; a map-style data set with a length is needed",
    ),
    "a missing label": (
        lambda path: trainer(path, scans().map(leave_out, with_indices=True)),
        "the label -1 at sample 4; needed is an integer from 0 to 2.*filter the sample out",
    ),
    "images in another column": (
        lambda path: trainer(path, scans().rename_column("pixel_values", "image")).train(),
        r"takes 'pixel_values', .*Rename the column .*by `dataset.rename_column\('image', 'pixel_values'\)`",
    ),
    "a number of labels that their names contradict": (
        lambda path: from_backbone(id2label={0: "a", 1: "b"}),
        "`num_labels` = 3 contradicts the 2 names of `id2label`; give one",
    ),
    "a forgotten route": (
        lambda path: labels_model()(IMAGES),
        "`route_ids` is missing, .*Say which ticket answers: `route_ids='ant'`, of 'ant', 'bee', 'cat', or one per sa",
    ),
    "an unknown route": (
        lambda path: labels_model()(IMAGES, route_ids="dog"),
        "unknown route 'dog'; the routes are 'ant', 'bee', 'cat'",
    ),
    "an index without a route": (
        lambda path: labels_model()(IMAGES, route_ids=3),
        "route 3 is out of range; allowed are 0 to 2, that is 'ant', 'bee', 'cat'",
    ),
    "routes of another number of samples": (
        lambda path: labels_model()(IMAGES, route_ids=["ant"]),
        "`route_ids` has 1 entries for a batch of 2; give one per sample",
    ),
    "a router without data of its own": (
        lambda path: trainer(path, scans(), router="entropy"),
        r"`router` = 'entropy' is fitted on data .*`RTLTrainingArguments\(calibration_fraction=0.1, …\)`, or pass",
    ),
    "a router that is not there": (
        lambda path: arguments(path, router="scores"),
        "`router` must be one of 'given', 'score', 'centroid', 'entropy', got 'scores'",
    ),
    "an odd batch": (
        lambda path: RTLTrainer(image_model(), arguments(path, route_batch_size=7), train_dataset=Images(24)),
        "`route_batch_size` = 7 must be a multiple of 2: a positive and a negative",
    ),
    "a sparsity of text": (
        lambda path: arguments(path, target_sparsity="50%"),
        "`target_sparsity` is '50%'; fractions",
    ),
    "a plain model": (
        lambda path: RTLTrainer(labels_model().extract_ticket(0), hospitals(path), train_dataset=scans()),
        "`model` must be an RTLModel, got TimmWrapperForImageClassification; make one with `from_backbone`",
    ),
    "plain arguments": (
        lambda path: RTLTrainer(labels_model(), TrainingArguments(str(path)), train_dataset=scans()),
        "`args` must be RTLTrainingArguments, got TrainingArguments; it takes the arguments of `TrainingArguments`",
    ),
    "the folder of a model that is not there": (
        lambda path: RTLModel.from_pretrained(path / "backbones" / "mode"),
        "mode' is no folder; '.*backbones' has 'model'",
    ),
    "a model that has no tickets": (
        lambda path: RTLModel.from_pretrained(path / "backbones" / "plain"),
        "a model of type 'timm_wrapper', which has no tickets yet; .*`RTLModelFor….from_backbone",
    ),
    "a model of another class": (
        lambda path: RTLModelForCausalLM.from_pretrained(path / "backbones" / "model"),
        "was saved as RTLModelForImageClassification, which RTLModelForCausalLM is not; `RTLModel.from_pretrained`",
    ),
    "a class of another task": (
        lambda path: RTLModelForImageClassification.from_backbone(
            BertConfig(hidden_size=8, num_attention_heads=2), route_names=["a"], ticket_task="labels"
        ),
        "Unrecognized configuration class.*BertConfig.*AutoModelForImageClassification.*Use the `RTLModelFor…` class",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two models in `backbones`, one of them without tickets."""
    folder = tmp_path_factory.mktemp("mistakes")
    labels_model().save_pretrained(folder / "backbones" / "model")
    labels_model().extract_ticket(0).save_pretrained(folder / "backbones" / "plain")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_words(mistake, folder):
    make, words = MISTAKES[mistake]
    before = sorted(folder.rglob("*"))
    with pytest.raises((TypeError, ValueError, OSError), match=f"(?s){words}") as refused:
        make(folder)
    assert sorted(folder.rglob("*")) == before and len(str(refused.value)) < 700


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return run(folder, target_sparsity=[0.3])


@pytest.mark.slow
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
    RTLTrainer(named, hospitals(tmp_path), train_dataset=scans())
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
