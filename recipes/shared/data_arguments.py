"""The arguments that choose the data of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers.hf_argparser import HfArg


@dataclass
class DataArguments:
    """Which images or texts a recipe reads, and how they become tensors."""

    dataset: str = HfArg(
        default="digits",
        help="'digits' (scikit-learn's, without a download), a folder of idx.gz files such as that of Debian's "
        "dataset-fashion-mnist, a folder of parquet files, or a Hub name such as uoft-cs/cifar10.",
    )
    config_name: str | None = HfArg(default=None, help="Configuration of the Hub data set, if it has several.")
    text_column: str | None = HfArg(default=None, help="Column of the texts. Without one, the data are images.")
    max_length: int = HfArg(default=128, help="Tokens of a text; longer texts are cut.")
    class_bounds: list[float] = HfArg(
        default_factory=list, help="Ascending bounds that cut labels of texts into classes, if labels are numbers."
    )
    class_names: list[str] = HfArg(default_factory=list, help="Names of these classes, one more than --class_bounds.")
    image_column: str = HfArg(default="image", help="Column of the images.")
    label_column: str = HfArg(default="label", help="Column of the classes. For images, these are the routes.")
    route_groups: str | None = HfArg(
        default=None,
        help="JSON or YAML file of {route: [classes]}, each class in one; default: each class is a route.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    test_split: str = HfArg(default="test", help="Split to evaluate on, not to train or calibrate on.")
    image_size: int | None = HfArg(default=None, help="Side to resize images to; default: their own.")
    num_channels: int = HfArg(default=3, help="1 for grey, 3 for colour.")
    mean: float = HfArg(default=0.5, help="Subtracted from pixels scaled to [0, 1].")
    std: float = HfArg(default=0.5, help="Divisor of pixels after that.")
    max_train_samples: int | None = HfArg(
        default=None, help="Draw this many training samples by seed; texts, equally many of each route."
    )
    max_test_samples: int | None = HfArg(default=None, help="Draw this many test samples by seed.")

    def on_card(self) -> dict[str, str]:
        """The fields of a model card on the data; none if the data are a folder of this machine."""
        if self.dataset == "digits":
            return {"dataset_name": "scikit-learn's digits, every fifth image", "dataset_split": "test"}
        if Path(self.dataset).expanduser().exists():
            return {}
        fields = {"datasets": self.dataset, "dataset_split": self.test_split}
        return fields if self.config_name is None else {**fields, "dataset_config": self.config_name}

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "data.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> DataArguments:
        return cls(**json.loads((Path(folder) / "data.json").read_text()))


def read_splits(arguments: DataArguments, columns: Mapping[str, str]) -> list[Dataset]:
    """
    The training and the test split of a folder of parquet files or of a Hub data set.

    Args:
        columns (`Mapping[str, str]`): name of an argument -> the column that it names.

    Raises:
        ValueError: a split lacks one of these columns.
    """
    folder = Path(arguments.dataset).expanduser()
    if folder.is_dir():
        files = {name: f"{name}*.parquet" for name in (arguments.train_split, arguments.test_split)}
        loaded = load_dataset("parquet", data_dir=str(folder), data_files=files)
    else:
        loaded = load_dataset(arguments.dataset, arguments.config_name)
    splits = [loaded[name] for name in (arguments.train_split, arguments.test_split)]
    for data in splits:
        for argument, column in columns.items():
            if column not in data.column_names:
                raise ValueError(
                    f"the data set {arguments.dataset!r} has no column {column!r}; it has "
                    f"{', '.join(data.column_names)}. Name the right one with --{argument}."
                )
    return splits
