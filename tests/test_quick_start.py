"""The lines of the README that find tickets, on its own example and on a language model that this test trains."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
)


README = Path(__file__).parents[1] / "README.md"
# The README's lines for texts.
LANGUAGES = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rtl import find_tickets

model = AutoModelForCausalLM.from_pretrained("org/language-model")
tokenizer = AutoTokenizer.from_pretrained("org/language-model")
texts = load_dataset("parquet", data_files="texts.parquet", split="train")  # columns text and language
texts = texts.map(lambda sample: tokenizer(sample["text"], truncation=True), remove_columns="text")
routed = find_tickets(model, texts, route_column="language", sparsity=0.5, refit=True, processing_class=tokenizer)
for language in routed.route_names:
    routed.extract_ticket(language, small=True).save_pretrained(language)
"""
ALPHABETS = {"north": "abcdef", "south": "uvwxyz"}


def sentence(letters, generator):
    """Letters that go on in the order of the alphabet, by one or by two."""
    places = np.cumsum(generator.integers(1, 3, 20)) + generator.integers(6)
    return " ".join(letters[place % 6] for place in places)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a trained model and its tokenizer as `org/language-model`, and texts."""
    folder = tmp_path_factory.mktemp("quick-start")
    generator = np.random.default_rng(0)
    rows = [
        {"text": sentence(letters, generator), "language": language}
        for _ in range(150)
        for language, letters in ALPHABETS.items()
    ]
    Dataset.from_list(rows).to_parquet(folder / "texts.parquet")
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", *"abcdefuvwxyz"])}
    tokens = Tokenizer(models.WordLevel(vocabulary))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=13, n_positions=20, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = torch.tensor(tokenizer([row["text"] for row in rows])["input_ids"])
    for step in range(120):
        part = batch[step * 30 % 300 :][:30]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "org" / "language-model")
    return folder


@pytest.mark.slow
def test_each_ticket_of_the_readme_reads_its_own_hospital_best(tmp_path, monkeypatch):
    training, lines = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(training, names)
    exec(lines, names)

    whole, labels = names["model"].eval(), names["labels"][1400:]
    tickets = {name: AutoModelForImageClassification.from_pretrained(name).eval() for name in names["hospitals"]}
    for hospital, images in names["hospitals"].items():
        with torch.no_grad():
            right = {
                name: float((model(images[1400:]).logits.argmax(1) == labels).double().mean())
                for name, model in {**tickets, "whole": whole}.items()
            }
        assert right[hospital] > right["whole"] - 0.05
        assert all(right[hospital] > right[other] + 0.05 for other in tickets if other != hospital)
    for ticket in tickets.values():
        assert type(ticket) is ViTForImageClassification
        # A quarter of the 128 neurons of two layers is left; a neuron has 64 + 1 weights before it and 64 after it.
        assert whole.num_parameters() - ticket.num_parameters() == 2 * 96 * (64 + 1 + 64)


@pytest.mark.slow
def test_it_saves_a_smaller_model_for_each_language(trained, monkeypatch):
    monkeypatch.chdir(trained)
    names: dict = {}
    exec(LANGUAGES, names)

    generator = np.random.default_rng(1)
    tickets = {name: AutoModelForCausalLM.from_pretrained(name).eval() for name in ALPHABETS}
    dense = AutoModelForCausalLM.from_pretrained("org/language-model")
    for language, letters in ALPHABETS.items():
        new = [sentence(letters, generator) for _ in range(20)]
        batch = torch.tensor(names["tokenizer"](new)["input_ids"])
        with torch.no_grad():
            losses = {name: float(ticket(input_ids=batch, labels=batch).loss) for name, ticket in tickets.items()}
            own = tickets[language](input_ids=batch).logits
            routed = names["routed"](input_ids=batch, route_ids=[language] * 20).logits
        assert losses[language] == min(losses.values())
        assert torch.allclose(own, routed, rtol=1e-4, atol=1e-4)
    for ticket in tickets.values():
        assert type(ticket) is GPT2LMHeadModel and ticket.config.n_inner == 64
        assert dense.num_parameters() - ticket.num_parameters() == 2 * 64 * (32 + 1 + 32)
