"""Images of classes as tensors in memory, for recipes that train many networks on the same few small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_rtl.data.partition import Rule

from .data_arguments import DataArguments
from .inputs import picture
from .rows import Rows, load_rows


class ImageTensors(Dataset):
    """
    Images held as `uint8 [N, channels, side, side]`, served as normalised `pixel_values` with their `label`.

    `column_names` are the keys of a sample, and `label_names` the names of the labels. If labels are groups of
    classes, `rule` says which class is in which group.
    """

    column_names = ["pixel_values", "label"]
    rule: Rule | None = None

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
    rows = load_rows(arguments, route_column=None, seed=seed)
    train, test = (_tensors(arguments, data, rows) for data in (rows.train, rows.test))
    if rows.rule is not None:
        train.rule = test.rule = rows.rule
    return train, test


def _tensors(arguments: DataArguments, data: datasets.Dataset, rows: Rows) -> ImageTensors:
    pixels = torch.stack([_pixels(value, arguments) for value in data[rows.input_column]])
    mean, std = (0.5 if value is None else value for value in (arguments.mean, arguments.std))
    return ImageTensors(pixels, torch.tensor(data[rows.route_column]), rows.route_names, mean=mean, std=std)


def _pixels(value: dict[str, Any], arguments: DataArguments) -> Tensor:
    """One image as `uint8 [channels, side, side]`."""
    image = picture(value, arguments.num_channels or 3)
    if arguments.image_size is not None and image.size != (arguments.image_size, arguments.image_size):
        image = image.resize((arguments.image_size, arguments.image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
