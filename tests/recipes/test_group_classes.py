"""`recipes/group_classes.py`: names are embedded and grouped into the file of routes."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import group_classes
import numpy as np
import pytest
import torch
import yaml
from transformers import BertModel

from hf_rtl import clustering
from tests.recipes.small_texts import make_tokenizer, save_data


def test_a_name_is_the_mean_of_its_own_tokens(encoder: str) -> None:
    names = ["good_film", "plot", "so fine_phone"]
    found = group_classes.embed(names, encoder)
    tokenizer, model = make_tokenizer(), BertModel.from_pretrained(encoder).eval()
    for name, embedding in zip(["good film", "plot", "so fine phone"], found, strict=True):
        tokens = tokenizer(name, return_tensors="pt")  # alone, without padding
        assert tokens["input_ids"].shape[1] == len(name.split()) + 2
        with torch.no_grad():
            expected = model(input_ids=tokens["input_ids"]).last_hidden_state[0].double().mean(dim=0)
        assert embedding.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("given", [True, False])
def test_classes_are_grouped_into_a_file(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cod", "oak", "eel", "elm", "yew", "carp"]
    fish = {"cod", "eel", "carp"}
    points = {name: [float(name in fish), 0.1 * index] for index, name in enumerate(names)}
    monkeypatch.setattr(group_classes, "embed", lambda names, encoder: torch.tensor([points[n] for n in names]))
    monkeypatch.setattr(
        clustering, "reduce_dimensions", lambda points, *options: np.array(points, dtype=np.float32)[:, :1]
    )
    labels = datasets.Dataset.from_dict({"fine": [0, 5, 3]}).cast_column("fine", datasets.ClassLabel(names=names))
    folder = save_data(tmp_path / "data", labels, labels)
    of_names = ["--names", *names] if given else ["--dataset", folder, "--label_column", "fine"]
    file = tmp_path / "groups.yaml"
    command = ["group_classes.py", *of_names, "--min_cluster_size", "2", "--groups_file", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    group_classes.main()
    groups = yaml.safe_load(file.read_text())
    assert sorted(map(set, groups.values()), key=sorted) == [fish, {"oak", "elm", "yew"}]


def test_the_groups_that_are_shipped_are_partitions() -> None:
    folder = Path(group_classes.__file__).parent / "groups"
    for file, number in (("cifar10.yaml", 10), ("cifar100.yaml", 100)):
        names = [name for group in yaml.safe_load((folder / file).read_text()).values() for name in group]
        assert len(names) == len(set(names)) == number
