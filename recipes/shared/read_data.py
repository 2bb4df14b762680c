"""Reading any data set: the rows of its training and test split, whose images and sounds are not decoded yet."""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
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
_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
# Only nothing is missing: "NA" and "None" may be names of classes.
_MISSING: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
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
    # What `save_to_disk` wrote has the format that it had.
    data = data.with_format(None)
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
                f"--dataset {arguments.dataset!r} is no file or folder here, and the Hub does not give it: {error}"
            ) from error
    if path.is_dir() and list(path.glob("*-ubyte.gz")):
        return _idx(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else {arguments.train_split: saved}
    builder = _builder(path)
    if builder in ("imagefolder", "audiofolder"):
        return _media_folder(path, arguments, builder)
    files = _table_files(path, arguments, builder)
    options = {"sep": _separator(next(iter(files.values()))[0]), **_MISSING} if builder == "csv" else {}
    try:
        splits = load_dataset(builder, data_files=files, **options)
    except Exception as error:  # Each builder and parser has errors of its own.
        cause = error.__cause__ or error
        raise BadInput(f"--dataset {arguments.dataset!r} cannot be read as {builder}: {cause}") from error
    # Files of text have empty lines between paragraphs.
    return splits.filter(lambda row: bool(row["text"].strip())) if builder == "text" else splits


def _visible(path: Path, builder: str | None = None) -> list[Path]:
    """
    A file, or the files in a folder without hidden ones, such as macOS's `._scan.png`. `builder`: only those that it
    reads.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
        and (builder is None or file.suffix.lower() in _SUFFIXES[builder])
    ]


def _builder(path: Path) -> str:
    """The builder of `datasets` for a file, or for the files in a folder."""
    found = Counter(file.suffix.lower() for file in _visible(path))
    numbers = {builder: sum(found[suffix] for suffix in suffixes) for builder, suffixes in _SUFFIXES.items()}
    # A folder of images or sounds may also hold a metadata.csv, and notes.
    for builder in ("imagefolder", "audiofolder"):
        if numbers[builder] > 1:
            return builder
    best = max(numbers, key=lambda builder: numbers[builder])
    if not numbers[best] or (path.is_file() and best in ("imagefolder", "audiofolder")):
        suffixes = ", ".join(sorted(suffix or "none" for suffix in found)) or "no files"
        raise BadInput(
            f"--dataset {str(path)!r} holds nothing that can be read: its suffixes are {suffixes}. Allowed are "
            "folders of images or sounds, csv, tsv, json, jsonl, parquet, arrow, txt and idx.gz, and what "
            "`save_to_disk` wrote."
        )
    return best


def _table_files(root: Path, arguments: DataArguments, builder: str) -> dict[str, list[str]]:
    """The files of every split: those that it names, or whose folder it names. Without such, all others train."""
    # The first split decides the types of columns.
    names = dict.fromkeys(filter(None, (arguments.train_split, arguments.test_split, *_TEST_SPLITS)))
    found: dict[str | None, list[str]] = {}
    for file in _visible(root, builder):
        parts = file.relative_to(root).parts
        of_file = (name for name in names if any(re.match(rf"{re.escape(name)}(?![a-z])", part) for part in parts))
        found.setdefault(next(of_file, None), []).append(str(file))
    if arguments.train_split not in found and None in found:
        found[arguments.train_split] = found[None]
    return {name: found[name] for name in names if name in found}


def _separator(file: str | Path) -> str:
    """What separates the columns of a csv file: comma, semicolon or tab, whichever its titles have most of."""
    with Path(file).open(encoding="utf-8-sig", errors="replace") as opened:
        titles = opened.readline()
    return max(",;\t", key=titles.count)


def _media_folder(root: Path, arguments: DataArguments, builder: str) -> dict[str, Dataset]:
    """
    Images or sounds in folders of their class, or in one folder, with the columns of a metadata.csv; splits are the
    folders `train`, `test` and `validation`. The builders of `datasets` would leave out the classes beside a
    metadata.csv, and need torchcodec for sounds.
    """
    names = (arguments.train_split, *([arguments.test_split] if arguments.test_split else _TEST_SPLITS))
    folders = {name: root / name for name in names if (root / name).is_dir()}
    outside = [file for file in _visible(root, builder) if file.relative_to(root).parts[0] not in folders]
    if folders and outside and (len(folders) == 1 or arguments.train_split not in folders):
        raise BadInput(
            f"{str(root)!r} has the folder {next(iter(folders))!r} of a split, and files outside it, such as "
            f"{str(outside[0].relative_to(root))!r}. Give the folder of the training data the name of --train_split, "
            f"{arguments.train_split!r}; or another name to a class that is called as a split."
        )
    if arguments.train_split not in folders:
        folders = {arguments.train_split: root}
    files = {name: _visible(folder, builder) for name, folder in folders.items()}
    in_classes = any(len({file.parent for file in of_split}) > 1 for of_split in files.values())
    return {name: _files(folders[name], root, of_split, builder, in_classes) for name, of_split in files.items()}


def _files(folder: Path, root: Path, files: Sequence[Path], builder: str, in_classes: bool) -> Dataset:
    column, feature = ("image", Image) if builder == "imagefolder" else ("audio", Audio)
    columns: dict[str, Any] = {column: None}
    if in_classes:
        columns["label"] = [file.parent.name for file in files]
    tables = [place / f"metadata.{suffix}" for place in (folder, root) for suffix in ("csv", "jsonl")]
    table = next((table for table in tables if table.exists()), None)
    if table is not None:
        columns |= _metadata(table, files)
    columns[column] = [str(file) for file in files]
    return Dataset.from_dict(columns).cast_column(column, feature(decode=False))


def _metadata(table: Path, files: Sequence[Path]) -> dict[str, Sequence[Any]]:
    """The columns of a metadata.csv or metadata.jsonl, in the order of `files`."""
    try:
        if table.suffix == ".csv":
            frame = pd.read_csv(table, sep=_separator(table), dtype={"file_name": str}, **_MISSING)
        else:
            frame = pd.read_json(table, lines=True, dtype=False)
    except ValueError as error:
        raise BadInput(f"{str(table)!r} cannot be read: {error}") from error
    if "file_name" not in frame:
        raise BadInput(f"{str(table)!r} needs a column 'file_name'; it has {', '.join(map(str, frame.columns))}.")
    frame.index = frame.pop("file_name").map(_normal)
    names = [_normal(str(file.relative_to(table.parent))) for file in files]
    missing = next((name for name in names if name not in frame.index), None)
    if missing is not None:
        raise BadInput(f"{str(table)!r} has no row whose file_name is {missing!r}.")
    chosen = frame[~frame.index.duplicated(keep="last")].loc[names]
    return Dataset.from_pandas(chosen, preserve_index=False)[:]


def _normal(name: str) -> str:
    """One spelling of a path: Windows has backslashes, and macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", PurePath(str(name).replace("\\", "/")).as_posix())


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
