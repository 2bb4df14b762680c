"""Texts of two words with their domain and sentiment, and a tiny encoder for these words."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


WORDS = ["bad", "poor", "so", "fine", "good", "great", "film", "phone", "plot", "cable"]
DOMAINS = {"film": ["film", "plot"], "gear": ["phone", "cable"]}


def sentences(number: int, seed: int, **columns: list) -> datasets.Dataset:
    """Sentences of two words with a sentiment from -2.5 to 2.5; two of three have the domain film."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list] = {"text": [], "domain": [], "sentiment": []}
    for index in range(number):
        domain = "gear" if index % 3 == 2 else "film"
        opinion = int(generator.integers(6))
        rows["text"].append(f"{WORDS[opinion]} {generator.choice(DOMAINS[domain])}" + " film" * (index % 2))
        rows["domain"].append(domain)
        rows["sentiment"].append(opinion - 2.5)
    return datasets.Dataset.from_dict({**rows, **columns})


def save_data(folder: Path, train: datasets.Dataset, test: datasets.Dataset) -> str:
    folder.mkdir()
    for name, split in (("train", train), ("test", test)):
        split.to_parquet(folder / f"{name}.parquet")
    return str(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def save_encoder(folder: Path) -> str:
    """Saves a pretrained encoder with its tokenizer."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=14,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
