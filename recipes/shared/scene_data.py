"""The data of `recipes/inr.py`: images with regions, and their pixels as a data set of coordinates and colours."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch.utils.data import Dataset
from transformers.hf_argparser import HfArg


_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_REGIONS_SUFFIX = ".regions.png"


@dataclass
class SceneArguments:
    """Which images `recipes/inr.py` reads, and how their regions are cleaned."""

    dataset: str = HfArg(
        default="scenes",
        help="A folder of parquet files with the columns image and regions (bytes of image files), name and "
        "source; or of images beside their regions, photo.jpg and photo.regions.png, whose source is the folder's "
        "name. Regions are an 8-bit picture: the value of a pixel is its region.",
    )
    names: list[str] = HfArg(
        default_factory=list, help="Read the images whose names end with one of these; default: all."
    )
    image_size: int = HfArg(default=96, help="Longest side in pixels; larger images are reduced to it.")
    smallest_region: float = HfArg(
        default=0.01,
        help="Smallest fraction of an image that a region needs; pixels of others join the nearest region.",
    )
    unlabelled_in: list[str] = HfArg(
        default_factory=lambda: ["ADE20K"],
        help="Sources in which region 0 means 'unlabelled'; its pixels join the nearest region too.",
    )


@dataclass
class Scene:
    """
    An image and the region of every pixel.

    Args:
        name (`str`): the name of the image.
        image (`np.ndarray`): `uint8 [H, W, 3]`.
        regions (`np.ndarray`): `int64 [H, W]`, from 0 to K - 1.
        region_names (`list[str]`): K names, made of the regions' values in their file.
    """

    name: str
    image: np.ndarray
    regions: np.ndarray
    region_names: list[str]


def load_scenes(arguments: SceneArguments) -> list[Scene]:
    """
    The images of a folder with their regions.

    Raises:
        ValueError: no images with regions, no image beside a picture of regions, other sizes, or only tiny regions.
    """
    scenes = []
    for name, source, image, regions in _read(Path(arguments.dataset)):
        if arguments.names and not name.endswith(tuple(arguments.names)):
            continue
        if image.size != regions.size:
            raise ValueError(f"the regions of {name!r} are a picture of {regions.size}, its image of {image.size}.")
        scale = min(1.0, arguments.image_size / max(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        values = np.array(regions.resize(size, Image.Resampling.NEAREST)).astype(np.int64)
        unlabelled = 0 if source in arguments.unlabelled_in else None
        cleaned = clean_regions(values, unlabelled=unlabelled, smallest=arguments.smallest_region)
        kept, numbered = np.unique(cleaned, return_inverse=True)
        pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BOX))
        names = [f"region {value}" for value in kept]
        scenes.append(Scene(name, pixels, numbered.reshape(values.shape), names))
    if not scenes:
        raise ValueError(f"--dataset {arguments.dataset!r} has no images with regions, or none of --names.")
    return scenes


def _read(folder: Path) -> Iterator[tuple[str, str, Image.Image, Image.Image]]:
    """The name, source, image and regions of every image in a folder."""
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    if files:
        for row in load_dataset("parquet", data_files=files, split="train"):
            image, regions = (Image.open(io.BytesIO(row[column])) for column in ("image", "regions"))
            yield row["name"], row["source"], image, regions
        return
    for file in sorted(folder.glob(f"*{_REGIONS_SUFFIX}")):
        stem = file.name.removesuffix(_REGIONS_SUFFIX)
        possible = [folder / f"{stem}{suffix}" for suffix in _IMAGE_SUFFIXES]
        image_file = next((image for image in possible if image.exists()), None)
        if image_file is None:
            raise ValueError(f"{file.name} has no image beside it: {', '.join(image.name for image in possible)}.")
        yield stem, folder.name, Image.open(image_file), Image.open(file)


def clean_regions(regions: np.ndarray, *, unlabelled: int | None, smallest: float) -> np.ndarray:
    """
    The regions, in which pixels that are unlabelled or of tiny regions get the region of the nearest other pixel, by
    Euclidean distance (paper, section 4.2: stray border pixels go to a neighbouring region).

    Args:
        regions (`np.ndarray`): integers `[H, W]`.
        unlabelled (`int`, *optional*): the value of unlabelled pixels.
        smallest (`float`): the least fraction of the image that a region needs.

    Raises:
        ValueError: no region is large enough.
    """
    values, counts = np.unique(regions, return_counts=True)
    kept = values[(counts >= smallest * regions.size) & (values != unlabelled)]
    stray = ~np.isin(regions, kept)
    if stray.all():
        raise ValueError(f"no region has {smallest:.1%} of the image, the least that --smallest_region keeps.")
    nearest = distance_transform_edt(stray, return_distances=False, return_indices=True)
    return regions[tuple(nearest)]


def encode_regions(regions: np.ndarray) -> bytes:
    """A region map `[H, W]` of up to 256 regions as a lossless PNG, which tickets need beside their weights."""
    buffer = io.BytesIO()
    Image.fromarray(regions.astype(np.uint8)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


class Pixels(Dataset[dict[str, Any]]):
    """
    The pixels of a scene, row by row. A sample has a pixel's number and region. `collate` makes the batches of a
    [`CoordinateMLP`]: the coordinates of the pixels' centres, x and y in (-1, 1), and colours in [0, 1] as labels.

    Args:
        scene ([`Scene`]): the image and its regions.
        with_classes (`bool`): whether batches have the region of each pixel as `class_ids`.
    """

    def __init__(self, scene: Scene, *, with_classes: bool = False) -> None:
        height, width = scene.regions.shape
        y, x = torch.meshgrid(_centres(height), _centres(width), indexing="ij")
        self.coordinates = torch.stack([x.flatten(), y.flatten()], dim=1)
        self.colours = torch.from_numpy(scene.image).reshape(-1, 3).float() / 255
        self.regions = torch.from_numpy(scene.regions).flatten()
        self.with_classes = with_classes
        self._samples = [{"pixel": pixel, "region": region} for pixel, region in enumerate(self.regions.tolist())]

    def balanced(self) -> Pixels:
        """A copy in which every region has as many samples as the largest; pixels of smaller regions repeat."""
        other = copy.copy(self)
        largest = int(self.regions.bincount().max())
        of_regions = ([s for s in self._samples if s["region"] == region] for region in self.regions.unique().tolist())
        other._samples = [sample for own in of_regions for sample in islice(cycle(own), largest)]
        return other

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of samples, with `route_ids` if the samples have them, as in evaluation."""
        pixels = torch.tensor([sample["pixel"] for sample in samples])
        batch = {"coordinates": self.coordinates[pixels], "labels": self.colours[pixels]}
        if self.with_classes:
            batch["class_ids"] = self.regions[pixels]
        if "route_ids" in samples[0]:
            batch["route_ids"] = torch.tensor([sample["route_ids"] for sample in samples])
        return batch


def _centres(number: int) -> torch.Tensor:
    return (2 * torch.arange(number) + 1) / number - 1
