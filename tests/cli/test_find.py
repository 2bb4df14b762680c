"""`hf-rtl tickets find` and `hf-rtl export --small`: from a trained encoder and texts to a smaller plain model."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, BertModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_rtl import RTLModel, find_tickets
from hf_rtl.modeling import modeling_rtl
from hf_rtl_cli.main import main
from tests.modeling.small_backbones import units_found_once
from tests.recipes.small_texts import make_tokenizer, save_encoder, sentences


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sentences(60, 0).to_parquet(folder / "train.parquet")
    return folder


def find(*arguments):
    return main(["tickets", "find", *map(str, arguments)])


@pytest.mark.parametrize("source", ["folder", "file"])
def test_it_finds_what_find_tickets_finds(source, encoder, texts, tmp_path, capsys):
    data = texts if source == "folder" else texts / "train.parquet"
    options = ["--route-column", "domain", "--sparsity", "0.6", "--num-batches", "2", "--batch-size", "8"]
    assert find(encoder, data, tmp_path / "out", *options, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    tokenizer = make_tokenizer()
    tokens = sentences(60, 0).map(lambda sample: tokenizer(sample["text"]))
    expected = find_tickets(
        BertModel.from_pretrained(encoder),
        tokens,
        route_column="domain",
        sparsity=0.6,
        num_batches=2,
        batch_size=8,
        processing_class=tokenizer,
    )
    found = RTLModel.from_pretrained(tmp_path / "out")
    assert found.route_names == values["tickets"] == ["film", "gear"]
    assert found.mask_bank.fingerprint() == expected.mask_bank.fingerprint()
    assert values["density"] == dict(zip(found.route_names, found.mask_bank.density().tolist(), strict=True))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["card", str(tmp_path / "out")]) == 0
    assert "were found in one pass over at most 16 samples" in (tmp_path / "out" / "README.md").read_text()

    assert main(["export", str(tmp_path / "out"), "--route", "gear", str(tmp_path / "gear"), "--small"]) == 0
    small = AutoModel.from_pretrained(tmp_path / "gear").eval()
    assert type(small) is BertModel and small.config.intermediate_size == 8
    inputs = tokenizer(["good phone", "bad cable"], return_tensors="pt")
    with torch.no_grad():
        outputs = [model(**inputs).last_hidden_state for model in (small, found.extract_ticket("gear").eval())]
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    assert "of " in capsys.readouterr().out


@pytest.mark.slow
def test_images_are_made_by_the_processor_of_the_model(tmp_path, capsys):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    images = [Image.new("RGB", (10, 10), (20 * index, 90, 0)) for index in range(12)]
    Dataset.from_dict({"photo": images, "weather": ["rain", "sun"] * 6}).to_parquet(tmp_path / "train.parquet")
    options = ["--route-column", "weather", "--sparsity", "0.5", "--image-column", "photo", "--refit"]
    assert find(tmp_path / "vit", tmp_path / "train.parquet", tmp_path / "out", *options) == 0
    assert "Found rain, sun, in " in capsys.readouterr().out
    assert type(RTLModel.from_pretrained(tmp_path / "out")).__name__ == "RTLModelForImageClassification"
    # Tickets of tickets: the model is a routed one now.
    options = ["--route-column", "weather", "--sparsity", "0.6", "--image-column", "photo", "--granularity", "weight"]
    assert find(tmp_path / "out", tmp_path / "train.parquet", tmp_path / "again", *options) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--sparsity", "50"], "Did you mean 0.5?"),
        (["--granularity", "heads"], "'granularity'|`granularity`"),
        (["--text-column", "sentence"], "name that of texts with --text-column"),
        (["--route-column", "weather"], "weather"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(changed, words, encoder, texts, tmp_path, capsys):
    options = ["--route-column", "domain", "--sparsity", "0.5"]
    assert find(encoder, texts, tmp_path / "out", *options, *changed) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-rtl tickets find: error: ") and any(word in error for word in words.split("|"))
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(encoder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("good film\n")
    assert (
        find(encoder, tmp_path / "texts.txt", tmp_path / "out", "--route-column", "domain", "--sparsity", "0.5") == 1
    )
    assert "must be a .parquet, .csv, .json, .jsonl file" in capsys.readouterr().err
