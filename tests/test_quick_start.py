"""The quick start of the README, on a language model that this test trains."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


README = Path(__file__).parents[1] / "README.md"
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
def test_it_saves_a_smaller_model_for_each_language(trained, monkeypatch):
    (code,) = re.findall(r"## Quick start\n.*?```python no-run\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 12
    monkeypatch.chdir(trained)
    names: dict = {}
    exec(code, names)

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
