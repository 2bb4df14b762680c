"""Image classification data as tensors in memory, from scikit-learn's digits, local files or the Hub."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_rtl import ByGroups, partition_by_groups

from .data_arguments import DataArguments, read_splits


class ImageTensors(Dataset):
    """
    Images held as `uint8 [N, channels, side, side]`, served as normalised `pixel_values` with their `label`.

    `column_names` are the keys of a sample, and `label_names` the names of the labels. If labels are groups of
    classes, `rule` says which class is in which group.
    """

    column_names = ["pixel_values", "label"]
    rule: ByGroups | None = None

    def __init__(self, images: Tensor, labels: Tensor, label_names: Sequence[str], *, mean: float, std: float) -> None:
        self.images, self.labels, self.label_names = images, labels, list(label_names)
        self.mean, self.std = mean, std

    @property
    def num_channels(self) -> int:
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        pixel_values = (self.images[list(indices)].float().div_(255) - self.mean) / self.std
        labels = self.labels[list(indices)].tolist()
        return [{"pixel_values": image, "label": label} for image, label in zip(pixel_values, labels, strict=True)]


def channels_last(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch in the channels-last format, in which convolutions on CPUs are up to twice as fast."""
    batch = default_data_collator(samples)
    return {**batch, "pixel_values": batch["pixel_values"].contiguous(memory_format=torch.channels_last)}


def load_images(arguments: DataArguments, *, seed: int) -> tuple[ImageTensors, ImageTensors]:
    """The training and the test images. With `route_groups`, their labels are the groups."""
    folder = Path(arguments.dataset).expanduser()
    if arguments.dataset == "digits":
        splits = _digits()
    elif folder.is_dir() and list(folder.glob("*-ubyte.gz")):
        splits = _idx(folder)
    else:
        splits = _datasets(arguments)
    limits = (arguments.max_train_samples, arguments.max_test_samples)
    train, test = (_tensors(arguments, *split, limit, seed) for split, limit in zip(splits, limits, strict=True))
    if arguments.route_groups is not None:
        partition = partition_by_groups(_named_labels(train), arguments.route_groups)
        for images, routes in ((train, partition), (test, partition.rule.assign(_named_labels(test)))):
            images.labels, images.label_names = torch.from_numpy(routes.route_ids), routes.route_names
            # The rule reads the column of the original data set.
            images.rule = replace(partition.rule, column=arguments.label_column)
    return train, test


def _named_labels(images: ImageTensors) -> list[dict[str, str]]:
    return [{"label": images.label_names[label]} for label in images.labels.tolist()]


def _digits() -> list[tuple[Any, np.ndarray, list[str]]]:
    """scikit-learn's 1,797 digits, every fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    test = np.arange(len(images)) % 5 == 4
    names = [str(name) for name in digits.target_names]
    return [(images[~test], digits.target[~test], names), (images[test], digits.target[test], names)]


_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]


def _idx(folder: Path) -> list[tuple[Any, np.ndarray, list[str]]]:
    """MNIST-like idx files, with the class names of Fashion-MNIST if the folder is named after it."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    splits = []
    for prefix in ("train", "t10k"):
        labels = read(f"{prefix}-labels-idx1", 8)
        images = read(f"{prefix}-images-idx3", 16).reshape(len(labels), 28, 28)
        names = _FASHION if "fashion" in str(folder) else [str(label) for label in range(int(labels.max()) + 1)]
        splits.append((images, labels.astype(np.int64), names))
    return splits


def _datasets(arguments: DataArguments) -> list[tuple[Any, np.ndarray, list[str]]]:
    result = []
    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    for data in read_splits(arguments, columns):
        labels = np.asarray(data[arguments.label_column])
        names = getattr(data.features[arguments.label_column], "names", None) or [
            str(i) for i in range(labels.max() + 1)
        ]
        result.append((data.select_columns(arguments.image_column), labels, names))
    return result


def _tensors(
    arguments: DataArguments, images: Any, labels: np.ndarray, names: list[str], limit: int | None, seed: int
) -> ImageTensors:
    chosen = np.sort(np.random.default_rng(seed).permutation(len(labels))[:limit])
    pictures = images[chosen] if isinstance(images, np.ndarray) else images.select(chosen)[arguments.image_column]
    pixels = torch.stack([_pixels(picture, arguments) for picture in pictures])
    return ImageTensors(pixels, torch.from_numpy(labels[chosen]), names, mean=arguments.mean, std=arguments.std)


def _pixels(picture: Any, arguments: DataArguments) -> Tensor:
    """One image as `uint8 [channels, side, side]`."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image = image.convert("L" if arguments.num_channels == 1 else "RGB")
    if arguments.image_size is not None and image.size != (arguments.image_size, arguments.image_size):
        image = image.resize((arguments.image_size, arguments.image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
