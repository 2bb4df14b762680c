"""`get_rtl_model`: routes, labels and task are read from the data, said, and used by the trainer."""

import logging
import re

import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset
from transformers import BertConfig

import hf_rtl
from hf_rtl import RTLTrainer, get_rtl_model
from tests.training.small_runs import ROUTES, arguments


def scans(number=24, *, num_channels=3, text=False, names=("disc", "square")):
    """Images of two classes from three hospitals."""
    generator = torch.Generator().manual_seed(0)
    labels = [index // 3 % 2 for index in range(number)]
    columns = {
        "pixel_values": torch.randn(number, num_channels, 16, 16, generator=generator).tolist(),
        "hospital": [ROUTES[index % 3] for index in range(number)],
        "label": [names[label] for label in labels] if text else labels,
    }
    images = Array3D((num_channels, 16, 16), "float32")  # read at once, unlike lists
    dataset = Dataset.from_dict(columns).cast_column("pixel_values", images).with_format("torch")
    return dataset if text else dataset.cast_column("label", ClassLabel(names=list(names)))


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_two_lines_train_tickets_for_labels_of_any_kind(tmp_path, capsys, text):
    dataset = scans(text=text)
    model = get_rtl_model("small_net_for_tests", dataset, route_column="hospital")
    trainer = RTLTrainer(
        model, arguments(tmp_path, target_sparsity=[0.3]), train_dataset=dataset, eval_dataset=dataset
    )
    said = capsys.readouterr().out.splitlines()
    trainer.train()
    assert [re.split(" {2,}", line) for line in said] == [
        ["routes", "3, of column 'hospital': ant, bee, cat"],
        ["ticket_task", "'labels', since the label is another column than the route"],
        ["model_class", "RTLModelForImageClassification"],
        ["labels", "2, of column 'label': disc, square"],
        ["seed", "0, of the weights that are not loaded"],
    ]
    assert model.route_names == ROUTES and model.config.id2label == {0: "disc", 1: "square"}
    # The labels that the tickets were evaluated on, in a loop over samples.
    right = 0
    for sample in dataset:
        logits = model(pixel_values=sample["pixel_values"][None], route_ids=sample["hospital"]).logits
        label = sample["label"] if text else ["disc", "square"][int(sample["label"])]
        right += model.config.id2label[int(logits.argmax())] == label
    assert trainer.rounds[-1]["metrics"]["eval_accuracy"] == pytest.approx(right / len(dataset))
    assert hf_rtl.load_rule(tmp_path / "final").column == "hospital"


def test_without_a_route_column_a_route_is_a_class(capsys):
    model = get_rtl_model("small_net_for_tests", scans(num_channels=1)).eval()
    assert (model.config.ticket_task, model.route_names, model.config.num_labels) == (
        "membership",
        ["disc", "square"],
        2,
    )
    assert model(pixel_values=torch.zeros(1, 1, 16, 16)).logits.shape == (1, 2)
    printed = capsys.readouterr().out
    assert "'membership', since the label says the route" in printed and "in_chans     1, the channels" in printed


def test_what_is_given_is_not_chosen_or_said(capsys):
    given = {"route_names": ["cat", "bee", "ant"], "ticket_task": "labels", "num_labels": 5, "seed": 3}
    model_class = hf_rtl.RTLModelForImageClassification
    model = get_rtl_model(
        "small_net_for_tests", scans(), route_column="hospital", model_class=model_class, in_chans=3, **given
    )
    assert model.route_names == ["cat", "bee", "ant"] and model.config.num_labels == 5
    assert capsys.readouterr().out == "routes       3, of column 'hospital': cat, bee, ant\n"


def test_the_columns_say_the_class_of_the_task():
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    columns = {"input_ids": [[1, 2], [3, 4]] * 3, "domain": list("aabbcc")}
    for labels, name, num_labels in (
        ([0.5, 2.0] * 3, "SequenceClassification", 1),
        ([0, 2] * 3, "SequenceClassification", 3),
        ([[0, 3], [-100, 1]] * 3, "TokenClassification", 4),
    ):
        dataset = Dataset.from_dict({**columns, "labels": labels})
        model = get_rtl_model(bert, dataset, route_column="domain")
        assert type(model).__name__ == f"RTLModelFor{name}" and model.config.num_labels == num_labels
    with pytest.raises(
        ValueError, match=r"columns 'domain', 'input_ids' do not say the task.*model_class=RTLModelForC"
    ):
        get_rtl_model(bert, Dataset.from_dict(columns), route_column="domain")
    with pytest.raises(ValueError, match="'input_ids', 'labels' do not say the task"):
        get_rtl_model(bert, Dataset.from_dict({**columns, "labels": [[0.0, 1.0]] * 6}), route_column="domain")
    with pytest.raises(ValueError, match="`route_column` must be given: the data set has none of the usual"):
        get_rtl_model(bert, Dataset.from_dict(columns))


@pytest.mark.parametrize("silence", ["logging", "another process"])
def test_silence_is_kept(capsys, monkeypatch, silence):
    logger = logging.getLogger("hf_rtl")
    before = logger.level
    monkeypatch.setenv("RANK", "1" if silence == "another process" else "0")
    try:
        logger.setLevel(logging.ERROR if silence == "logging" else before)
        get_rtl_model("small_net_for_tests", scans(), route_column="hospital")
    finally:
        logger.setLevel(before)
    assert capsys.readouterr().out == ""
