"""Small files of a user, images, sounds and texts, and tiny backbones for them."""

from __future__ import annotations

import csv
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from tests.recipes.small_texts import WORDS, make_tokenizer


RATE = 1_000


def save_image(file: Path, shade: int, seed: int = 0) -> None:
    """A noisy image of 12 x 8 pixels whose mean is about `shade`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (8, 12, 3))
    Image.fromarray((noise + shade).clip(0, 255).astype(np.uint8)).save(file)


def save_csv(file: Path, rows: Sequence[dict[str, Any]], *, separator: str = ",", encoding: str = "utf-8") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding=encoding) as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def save_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def save_images(root: Path, cells: dict[tuple[str, str], int], *, folder: str = "") -> Path:
    """
    Images in the folders of their class, and a metadata.csv that says the hospital of each.

    Args:
        cells (`dict`): (class, hospital) -> the number of its images. The shade tells the class.
        folder (`str`): one of a split, in `root`.
    """
    rows = []
    classes = sorted({label for label, _ in cells})
    for (label, hospital), number in cells.items():
        for _ in range(number):
            file = root / folder / label / f"{len(rows):03}.png"
            shade = 60 + 120 * classes.index(label) // max(1, len(classes) - 1)
            save_image(file, shade, seed=len(rows) + 1000 * len(folder))
            rows.append({"file_name": file.relative_to(root / folder).as_posix(), "hospital": hospital})
    save_csv(root / folder / "metadata.csv", rows[::-1])
    return root


def save_sound(file: Path, samples: np.ndarray, rate: int = RATE, *, channels: int = 1) -> None:
    """A wav file of 16-bit samples, `[samples]` or `[samples, channels]`, from -1 to 1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(seconds: float, frequency: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def language_tokenizer() -> PreTrainedTokenizerFast:
    """That of small_texts.py with an end of texts and a mask, which are its last two tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[EOS]", "mask_token": "[MASK]"})
    return tokenizer


def save_backbone(kind: str, folder: Path) -> str:
    """Saves a pretrained `causal`, `masked` or `seq2seq` language model, or an `audio` encoder."""
    torch.manual_seed(5)
    sizes = {"vocab_size": len(WORDS) + 6}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "causal":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    elif kind == "masked":
        model = BertForMaskedLM(BertConfig(**sizes, **bert, max_position_embeddings=16))
    elif kind == "seq2seq":
        size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, **size, pad_token_id=0, decoder_start_token_id=0))
    else:
        layers = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
        groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        model = Wav2Vec2Model(Wav2Vec2Config(**bert, **layers, **groups, mask_time_prob=0.0, layerdrop=0.0))
        Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=False).save_pretrained(folder)
    model.save_pretrained(folder)
    if kind != "audio":
        language_tokenizer().save_pretrained(folder)
    return str(folder)
