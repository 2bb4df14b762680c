"""Samples as inputs of a backbone, by its own processor: decoded at every use, or held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import Array3D, Dataset, Features, List, Value
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Wav2Vec2FeatureExtractor,
)

from hf_rtl import image_processor_from_timm
from hf_rtl.modeling.image_processing import savable_processor

from .arguments import BadInput
from .audio import read_audio
from .check_rows import file_name, opened
from .data_arguments import DataArguments
from .read_data import require_columns
from .rows import LABEL, WORD_LABELS, Rows, sample_names, with_classes


# What the loss leaves out.
_IGNORED = -100


@dataclass
class Inputs:
    """
    The samples as tensors.

    Args:
        train, test (`Dataset`): inputs of the backbone, `label` or `labels`, and the column of the route.
        processor: what made them, to save with the model.
        collator (`Callable`, *optional*): makes a batch of samples.
        options (`dict`): for `from_backbone`.
    """

    train: Dataset
    test: Dataset
    processor: Any
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def make_inputs(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    """Makes the inputs of a task. Raises `BadInput` if samples and backbone do not fit, or a text is empty."""
    return _MAKERS[rows.task](rows, arguments, backbone)


def decoder(rows: Rows, arguments: DataArguments) -> Callable[[Any], Any]:
    """The function that decodes an image or a sound of undecoded rows."""
    if rows.task == "audio":
        return lambda value: read_audio(opened(value), 16_000)
    return lambda value: picture(value, arguments.num_channels or 3)


# Images


class ImageTransform:
    """Makes `pixel_values` of a batch of rows: decodes, and calls what makes pixels of a PIL image."""

    def __init__(self, column: str, pixels: Callable[[Any], Tensor], num_channels: int) -> None:
        self.column, self.pixels, self.num_channels = column, pixels, num_channels

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        others = {name: values for name, values in batch.items() if name != self.column}
        if self.column not in batch:
            return others
        images = [_decoded(value, lambda value: picture(value, self.num_channels)) for value in batch[self.column]]
        return {**others, "pixel_values": [self.pixels(image) for image in images]}


def _images(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    num_channels = arguments.num_channels or 3
    first = picture(rows.train[0][rows.input_column], num_channels)
    processor = image_processor(backbone, arguments, first.size)
    plain = partial(_processed, processor)
    shape = tuple(plain(first).shape)
    held = {"pixel_values": Array3D(shape, "float32")}
    changed = _augmented(arguments.augmentation, processor, shape)
    served = ImageTransform(rows.input_column, plain, num_channels)
    train = (
        rows.train.with_transform(ImageTransform(rows.input_column, changed, num_channels))
        if changed is not None
        else _served(rows.train, served, held, arguments.in_memory)
    )
    return Inputs(train, _served(rows.test, served, held, arguments.in_memory), processor)


def _processed(processor: Any, image: Any) -> Tensor:
    # One by one, since processors want images of a batch to have one size.
    return processor(image, return_tensors="pt").pixel_values[0]


def image_processor(backbone: str, arguments: DataArguments, size: tuple[int, int]) -> Any:
    """
    The image processor of a backbone whose weights are loaded. A timm name has weights from scratch: images keep the
    size of the first one. `image_size`, `mean` and `std` replace what the processor has.
    """
    own = (arguments.image_size, arguments.mean, arguments.std)
    if not is_timm_name(backbone) and own == (None,) * 3:
        try:
            # A processor that is saved and loaded makes the same pixels with PIL, and rounds others with torchvision.
            return savable_processor(AutoImageProcessor.from_pretrained(backbone, backend="pil"))
        except (OSError, ValueError) as error:
            raise BadInput(
                f"--backbone {backbone!r} has no image processor; say how images become tensors: --image_size 224 "
                "--mean 0.5 --std 0.5."
            ) from error
    width, height = size if arguments.image_size is None else (arguments.image_size,) * 2
    num_channels = arguments.num_channels or 3
    return image_processor_from_timm(
        {
            "input_size": (num_channels, height, width),
            "interpolation": "bilinear",
            "mean": (0.5 if arguments.mean is None else arguments.mean,) * num_channels,
            "std": (0.5 if arguments.std is None else arguments.std,) * num_channels,
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
    )


def is_timm_name(backbone: str) -> bool:
    # With the prefix, it is a repo id, whose weights and processor are loaded.
    return timm.is_model(backbone) and not Path(backbone).exists()


def picture(value: dict[str, Any], num_channels: int) -> Any:
    """An undecoded image as a grey or coloured PIL image."""
    from PIL import Image, ImageOps

    with Image.open(opened(value)) as image:
        # Cameras write how a picture was turned beside its pixels.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            # `convert` would cut off all above 255 of 16-bit pixels.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("L" if num_channels == 1 else "RGB")


def _augmented(name: str, processor: Any, shape: Sequence[int]) -> Callable[[Any], Tensor] | None:
    """Makes pixels of a PIL image that is changed first; the generators of the sample decide how."""
    if name == "none":
        return None
    if name == "timm":
        from PIL.Image import Resampling

        channels = shape[0]
        return timm.data.create_transform(
            tuple(shape),
            is_training=True,
            interpolation=Resampling(processor.resample).name.lower(),
            mean=processor.image_mean if processor.do_normalize else [0.0] * channels,
            std=processor.image_std if processor.do_normalize else [1.0] * channels,
        )
    from torchvision.transforms import v2

    changes: list[Any] = [v2.RandomHorizontalFlip()]
    if name != "flip":
        changes.append(v2.RandomAffine(0, translate=(0.125, 0.125)))
    if name == "randaugment":
        changes.append(v2.RandAugment())
    return v2.Compose([*changes, partial(_processed, processor)])


# Sounds


class AudioTransform:
    """Makes the features of a batch of sounds, each of the same length."""

    def __init__(self, column: str, extractor: Any, max_seconds: float) -> None:
        self.column, self.extractor = column, extractor
        self.length = round(max_seconds * extractor.sampling_rate)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        others = {name: values for name, values in batch.items() if name != self.column}
        if self.column not in batch:
            return others
        rate = self.extractor.sampling_rate
        features = []
        for value in batch[self.column]:
            sound = _decoded(value, lambda value: read_audio(opened(value), rate))[: self.length]
            sound = np.pad(sound, (0, self.length - len(sound)))
            features.append(self.extractor(sound, sampling_rate=rate, return_tensors="pt"))
        return {**others, **{name: [made[name][0] for made in features] for name in features[0]}}


def _sounds(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    try:
        extractor = AutoFeatureExtractor.from_pretrained(backbone)
    except (OSError, ValueError):
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=False)
    transform = AudioTransform(rows.input_column, extractor, arguments.max_seconds)
    made = transform({rows.input_column: [rows.train[0][rows.input_column]]})
    held = {name: _feature_of(values[0]) for name, values in made.items()}
    train, test = (_served(data, transform, held, arguments.in_memory) for data in (rows.train, rows.test))
    return Inputs(train, test, extractor)


def _feature_of(tensor: Tensor) -> Any:
    inner: Any = Value(str(tensor.dtype).removeprefix("torch."))
    for length in reversed(tensor.shape):
        inner = List(inner, length)
    return inner


# Texts


def _tokenizer(backbone: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise BadInput(f"--backbone {backbone!r} has no tokenizer that can be read: {error}") from error
    if tokenizer.pad_token is None:
        # Masked out, so that any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _texts(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    tokenizer = _tokenizer(backbone)

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(batch[rows.input_column], truncation=True, max_length=arguments.max_length)

    train, test = (_tokenised(_with_texts(data, rows.input_column), rows, tokens) for data in (rows.train, rows.test))
    return Inputs(train, test, tokenizer, DataCollatorWithPadding(tokenizer))


def _words(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    """Words with a label each; the label of a word is that of its first token, and no other token has one."""
    tokenizer = _tokenizer(backbone)
    found = (name for name in WORD_LABELS if name in rows.train.column_names)
    column = arguments.label_column or next(found, "labels")
    require_columns(arguments, rows.train, {"label_column": column})
    names = getattr(getattr(rows.train.features[column], "feature", None), "names", None)
    # Integers of a `ClassLabel` are the ids.
    given = range(len(names)) if names is not None else sorted({*chain(*filter(None, rows.train[column]))} - {None})
    known, names = {label: index for index, label in enumerate(given)}, names or list(map(str, given))
    for data in (rows.train, rows.test):
        for index, (words, labels) in enumerate(zip(data[rows.input_column], data[column], strict=True)):
            if not words or len(words) != len(labels or []) or not {*labels} <= {*known, None}:
                raise BadInput(
                    f"sample {index} needs words in {rows.input_column!r}, each with a label in {column!r} that "
                    f"training data have ({', '.join(names)}); it has {words} and {labels}."
                )

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = tokenizer(
            batch[rows.input_column], is_split_into_words=True, truncation=True, max_length=arguments.max_length
        )
        labels = []
        for index, of_words in enumerate(batch[column]):
            words, row = made.word_ids(index), []
            for position, word in enumerate(words):
                first = word is not None and (position == 0 or words[position - 1] != word)
                label = of_words[word] if first else None
                row.append(_IGNORED if label is None else known[label])
            labels.append(row)
        return {**made, "labels": labels}

    train, test = (_tokenised(data, rows, tokens) for data in (rows.train, rows.test))
    options = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return Inputs(train, test, tokenizer, DataCollatorForTokenClassification(tokenizer), options)


# Language models


def _causal(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    tokenizer = _tokenizer(backbone)
    train, test = (_blocks(data, rows, tokenizer, arguments) for data in (rows.train, rows.test))
    train, test = (data.add_column("labels", data["input_ids"][:]) for data in (train, test))
    return Inputs(train.with_format("torch"), test.with_format("torch"), tokenizer)


class MaskTransform:
    """Hides a part of the tokens of every sample, as [`DataCollatorForLanguageModeling`] does by default."""

    def __init__(self, tokenizer: Any) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "input_ids" not in batch:
            return dict(batch)
        hidden = [self.collator.torch_mask_tokens(torch.tensor(tokens)[None]) for tokens in batch["input_ids"]]
        return {
            **batch,
            "input_ids": [inputs[0] for inputs, _ in hidden],
            "labels": [labels[0] for _, labels in hidden],
        }


def _masked(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    """Training tokens are hidden anew at every use, test tokens once."""
    tokenizer = _tokenizer(backbone)
    transform = MaskTransform(tokenizer)
    train, test = (_blocks(data, rows, tokenizer, arguments) for data in (rows.train, rows.test))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        test = test.map(transform, batched=True, keep_in_memory=True, new_fingerprint="hidden").with_format("torch")
    return Inputs(train.with_transform(transform), test, tokenizer)


def _seq2seq(rows: Rows, arguments: DataArguments, backbone: str) -> Inputs:
    if arguments.target_column is None:
        raise BadInput("a seq2seq model needs --target_column NAME: the texts that it writes.")
    require_columns(arguments, rows.train, {"target_column": arguments.target_column})
    tokenizer = _tokenizer(backbone)

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        given, target = batch[rows.input_column], batch[arguments.target_column]
        return tokenizer(given, text_target=target, truncation=True, max_length=arguments.max_length)

    both = [rows.input_column, arguments.target_column]
    train, test = (_tokenised(_with_texts(data, *both), rows, tokens) for data in (rows.train, rows.test))
    return Inputs(train, test, tokenizer, DataCollatorForSeq2Seq(tokenizer))


def _blocks(data: Dataset, rows: Rows, tokenizer: Any, arguments: DataArguments) -> Dataset:
    """
    Samples of `max_length` tokens: the texts of a route one after the other, each ended by the tokenizer's end. The
    rest of a route is left out. Without `pack`, the beginnings of the texts that are long enough.
    """
    length = arguments.max_length
    made = tokenizer(_with_texts(data, rows.input_column)[rows.input_column][:], add_special_tokens=not arguments.pack)
    end = [] if tokenizer.eos_token_id is None or not arguments.pack else [tokenizer.eos_token_id]
    names = sample_names(data, rows.route_column) if rows.route_names else ["all"] * len(data)
    blocks, routes = [], []
    for name in dict.fromkeys(names):
        texts = [tokens + end for tokens, of_text in zip(made["input_ids"], names, strict=True) if of_text == name]
        if arguments.pack:
            joined = [token for tokens in texts for token in tokens]
            texts = [joined[start : start + length] for start in range(0, len(joined), length)]
        found = [tokens[:length] for tokens in texts if len(tokens) >= length]
        if not found:
            raise BadInput(f"route {name!r} has no {length} tokens; lower --max_length.")
        blocks.extend(found)
        routes.extend([name] * len(found))
    packed = Dataset.from_dict({"input_ids": blocks}, Features({"input_ids": List(Value("int64"), length)}))
    if not rows.route_names:
        return packed
    return with_classes(packed, rows.route_column, routes, rows.route_names, rows.route_column)


# All


def _served(data: Dataset, transform: Callable[..., Any], held: dict[str, Any], in_memory: bool) -> Dataset:
    """The rows as `transform` makes them at every use, or once: `held` are the features that it makes."""
    if not in_memory:
        return data.with_transform(transform)
    kept = {name: feature for name, feature in data.features.items() if name != transform.column}

    def arrays(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        made = transform(batch)
        return {name: list(map(np.asarray, values)) if name in held else values for name, values in made.items()}

    made = data.map(
        arrays,
        batched=True,
        batch_size=64,
        remove_columns=transform.column,
        features=Features({**kept, **held}),
        keep_in_memory=True,
        new_fingerprint=f"{data._fingerprint}-held",
        desc="Decoding",
    )
    return made.with_format("torch")


def _tokenised(data: Dataset, rows: Rows, tokens: Callable[..., Any]) -> Dataset:
    kept = [*[LABEL] * bool(rows.label_names), *[rows.route_column] * bool(rows.route_names)]
    removed = [name for name in data.column_names if name not in kept]
    return data.map(
        tokens,
        batched=True,
        remove_columns=removed,
        keep_in_memory=True,
        new_fingerprint=f"{data._fingerprint}-tokens",
    )


def _with_texts(data: Dataset, *columns: str) -> Dataset:
    """The data. Raises `BadInput` if a text is empty or missing."""
    for column in columns:
        for index, text in enumerate(data[column]):
            if not isinstance(text, str) or not text.strip():
                raise BadInput(
                    f"column {column!r} has {text!r} at sample {index}, which is no text; remove rows without a text."
                )
    return data


def _decoded(value: dict[str, Any], decode: Callable[[Any], Any]) -> Any:
    try:
        return decode(value)
    except Exception as error:
        raise BadInput(
            f"{file_name(value, 0) if value['path'] else 'a file'} cannot be decoded: {error}. Mend it, or leave "
            "such files out with --skip_unreadable and another --output_dir."
        ) from error


_MAKERS = {
    "image": _images,
    "audio": _sounds,
    "text": _texts,
    "token": _words,
    "causal": _causal,
    "masked": _masked,
    "seq2seq": _seq2seq,
}
