"""Reading any data set: the rows of its training and test split, whose images and sounds are not decoded yet."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .arguments import BadInput
from .data_arguments import DataArguments


# Builder of `datasets` -> the suffixes of its files.
_SUFFIXES: dict[str, Sequence[str]] = {
    "imagefolder": ImageFolder.EXTENSIONS,
    "audiofolder": AudioFolder.EXTENSIONS,
    "csv": (".csv", ".tsv"),
    "json": (".json", ".jsonl"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt",),
}
_TEST_SPLITS = ("test", "validation")
_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]


def read_splits(arguments: DataArguments, columns: Mapping[str, str]) -> list[Dataset]:
    """
    The training and the test split, with `columns`.

    Args:
        columns (`Mapping[str, str]`): name of an argument -> the column that it names.

    Raises:
        BadInput: the data cannot be read, or lack a split or one of these columns.
    """
    train, test = read(arguments)
    if test is None:
        raise BadInput(
            f"{arguments.dataset!r} has no test split; name one with --test_split. It has {arguments.train_split!r}."
        )
    for data in (train, test):
        require_columns(arguments, data, columns)
    return [train, test]


def require_columns(arguments: DataArguments, data: Dataset, columns: Mapping[str, str]) -> None:
    """Raises `BadInput` if the data lack one of `columns`; see `read_splits`."""
    for argument, column in columns.items():
        if column not in data.column_names:
            raise BadInput(
                f"the data set {arguments.dataset!r} has no column {column!r}; it has "
                f"{', '.join(data.column_names)}. Name the right one with --{argument}."
            )


def read(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The training split, and the test split if there is one. Raises `BadInput` if the data cannot be read."""
    splits = _load(arguments)
    named = [arguments.train_split, *([arguments.test_split] if arguments.test_split else [])]
    for name in named:
        if name not in splits:
            raise BadInput(
                f"the data set {arguments.dataset!r} has no split {name!r}; it has {', '.join(splits)}. Name another "
                f"with --{'train' if name == arguments.train_split else 'test'}_split."
            )
    train = splits[arguments.train_split]
    others = [arguments.test_split] if arguments.test_split else _TEST_SPLITS
    test = next((splits[name] for name in others if name in splits and name != arguments.train_split), None)
    for name, data in ((arguments.train_split, train), ("test", test)):
        if data is not None and not len(data):
            raise BadInput(f"the split {name!r} of the data set {arguments.dataset!r} is empty.")
    return _undecoded(train), None if test is None else _undecoded(test)


def _undecoded(data: Dataset) -> Dataset:
    for name, feature in data.features.items():
        if isinstance(feature, (Image, Audio)):
            data = data.cast_column(name, type(feature)(decode=False))
    return data


def _load(arguments: DataArguments) -> Mapping[str, Dataset]:
    path = Path(arguments.dataset).expanduser()
    if arguments.dataset == "digits":
        return _digits()
    if not path.exists():
        try:
            return load_dataset(arguments.dataset, arguments.config_name)
        except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
            raise BadInput(
                f"--dataset {arguments.dataset!r} is no file or folder here, and cannot be loaded from the Hub: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if path.is_dir() and list(path.glob("*-ubyte.gz")):
        return _idx(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else {arguments.train_split: saved}
    builder = _builder(path)
    if builder in ("imagefolder", "audiofolder"):
        return _media_folder(path, arguments, builder)
    options: dict[str, Any] = {}
    if path.is_file():
        options["data_files"] = {arguments.train_split: str(path)}
        if path.suffix == ".tsv":
            options["sep"] = "\t"
    else:
        options["data_dir"] = str(path)
        # The first split decides the types of columns.
        names = dict.fromkeys((arguments.train_split, arguments.test_split, *_TEST_SPLITS))
        named = {name: f"{name}*" for name in names if name and any(map(Path.is_file, path.glob(f"{name}*")))}
        if arguments.train_split in named:
            options["data_files"] = named
    try:
        return load_dataset(builder, **options)
    except Exception as error:  # Each builder and parser has errors of its own.
        cause = error.__cause__ or error
        raise BadInput(f"--dataset {arguments.dataset!r} cannot be read as {builder}: {cause}") from error


def _builder(path: Path) -> str:
    """The builder of `datasets` for a file, or for the files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = Counter(file.suffix.lower() for file in files)
    numbers = {builder: sum(found[suffix] for suffix in suffixes) for builder, suffixes in _SUFFIXES.items()}
    # A folder of images or sounds may also hold a metadata.csv, and notes.
    for builder in ("imagefolder", "audiofolder"):
        if numbers[builder] > 1:
            return builder
    best = max(numbers, key=lambda builder: numbers[builder])
    if not numbers[best]:
        suffixes = ", ".join(sorted(suffix or "none" for suffix in found)) or "no files"
        raise BadInput(
            f"--dataset {str(path)!r} holds nothing that can be read: its suffixes are {suffixes}. Allowed are "
            "images, sounds, csv, tsv, json, jsonl, parquet, arrow, txt and idx.gz, and what `save_to_disk` wrote."
        )
    return best


def _media_folder(root: Path, arguments: DataArguments, builder: str) -> dict[str, Dataset]:
    """
    Images or sounds in folders of their class, or in one folder, with the columns of a metadata.csv; splits are the
    folders `train`, `test` and `validation`. The builders of `datasets` would leave out the classes beside a
    metadata.csv, and need torchcodec for sounds.
    """
    names = (arguments.train_split, *([arguments.test_split] if arguments.test_split else _TEST_SPLITS))
    folders = {name: root / name for name in names if (root / name).is_dir()}
    if arguments.train_split not in folders:
        folders = {arguments.train_split: root}
    return {name: _files(folder, root, builder) for name, folder in folders.items()}


def _files(folder: Path, root: Path, builder: str) -> Dataset:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES[builder])
    column, feature = ("image", Image) if builder == "imagefolder" else ("audio", Audio)
    columns: dict[str, list[Any]] = {column: [str(file) for file in files]}
    if len({file.parent for file in files}) > 1:
        columns["label"] = [file.parent.name for file in files]
    for place in dict.fromkeys((folder, root)):
        if (place / "metadata.csv").exists():
            for name, values in _metadata(place, files).items():
                columns[name] = values
            break
    return Dataset.from_dict(columns).cast_column(column, feature(decode=False))


def _metadata(folder: Path, files: Sequence[Path]) -> dict[str, list[str]]:
    """The columns of the metadata.csv in a folder, in the order of `files`."""
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        titles = list(reader.fieldnames or [])
        if "file_name" not in titles:
            raise BadInput(
                f"the metadata.csv of {folder.name!r} needs a column 'file_name'; it has {', '.join(titles)}."
            )
        rows = {row["file_name"]: row for row in reader}
    names = [file.relative_to(folder).as_posix() for file in files]
    missing = next((name for name in names if name not in rows), None)
    if missing is not None:
        raise BadInput(f"the metadata.csv of {folder.name!r} has no row whose file_name is {missing!r}.")
    others = [title for title in titles if title != "file_name"]
    return {column: [rows[name][column] for name in names] for column in others}


def _digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 digits, every fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    test = np.arange(len(images)) % 5 == 4
    names = [str(name) for name in digits.target_names]
    return {
        "train": _of_arrays(images[~test], digits.target[~test], names),
        "test": _of_arrays(images[test], digits.target[test], names),
    }


def _idx(folder: Path) -> dict[str, Dataset]:
    """MNIST-like idx files, with the class names of Fashion-MNIST if the folder is named after it."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        labels = read(f"{prefix}-labels-idx1", 8).astype(np.int64)
        images = read(f"{prefix}-images-idx3", 16).reshape(len(labels), 28, 28)
        names = _FASHION if "fashion" in str(folder) else [str(label) for label in range(int(labels.max()) + 1)]
        splits[split] = _of_arrays(images, labels, names)
    return splits


def _of_arrays(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    """Grey images, `uint8 [N, height, width]`, with their labels."""
    from PIL import Image as Pictures

    rows = {"image": [Pictures.fromarray(image) for image in images], "label": labels.tolist()}
    return Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=names)}))
