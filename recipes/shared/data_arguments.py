"""The arguments that choose the model and the data of a recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg


TASKS = ("image", "audio", "text", "token", "causal", "masked", "seq2seq")
AUGMENTATIONS = ("none", "flip", "crop", "randaugment", "timm")


@dataclass
class ModelArguments:
    """The backbone, and what tickets mask and share."""

    backbone: str = HfArg(default="ghostnet_rtl", help="A timm name, a repo id or a folder.")
    norm_statistics: str = HfArg(
        default="per_route", help="Running statistics of normalisation: per_route, or shared (the paper's)."
    )
    prune_include: list[str] = HfArg(default_factory=list, help="Patterns of more weights to prune.")
    prune_exclude: list[str] | None = HfArg(default=None, help="Patterns of weights never to prune.")
    threads: int | None = HfArg(default=None, help="CPU threads; by default torch decides.")

    def options(self) -> dict[str, Any]:
        """Those for `from_backbone`."""
        return {name: getattr(self, name) for name in ("norm_statistics", "prune_include", "prune_exclude")}


@dataclass
class DataArguments:
    """Which samples a recipe reads, what is asked of them, and how they become tensors."""

    dataset: str = HfArg(
        default="digits",
        help="A folder or file: images or sounds in folders of their class, csv, json, jsonl, parquet, arrow, txt, "
        "idx.gz, or what `save_to_disk` wrote. Or a Hub name such as uoft-cs/cifar10. Or 'digits', scikit-learn's.",
    )
    config_name: str | None = HfArg(default=None, help="Configuration of the Hub data set, if it has several.")
    task: str | None = HfArg(
        default=None,
        metadata={"choices": TASKS},
        help="Classification of images, sounds, texts or tokens, or a causal, masked or seq2seq language model; "
        "default: what the columns admit.",
    )
    ticket_task: str | None = HfArg(
        default=None,
        metadata={"choices": ("membership", "labels")},
        help="membership: a ticket tells its route's samples from all others; labels: it predicts the label. Default: "
        "membership if the label is the route, else labels.",
    )
    input_column: str | None = HfArg(default=None, help="Column of images, sounds or texts; default: the only one.")
    target_column: str | None = HfArg(default=None, help="Column of the texts that a seq2seq model writes.")
    label_column: str | None = HfArg(
        default=None, help="Column of the classes; default: 'label', 'labels', or the only column of classes."
    )
    class_bounds: list[float] = HfArg(
        default_factory=list, help="Ascending bounds that cut labels into classes, if labels are numbers."
    )
    class_names: list[str] = HfArg(default_factory=list, help="Names of these classes, one more than --class_bounds.")
    route_groups: str | None = HfArg(
        default=None,
        help="JSON or YAML file of {route: [classes]}, each class in one: these groups are the routes, in place of "
        "--route_column. recipes/group_classes.py writes one from the names of classes.",
    )
    cluster_routes: int | None = HfArg(
        default=None, help="Find so many routes: clusters of what the backbone, before training, makes of a sample."
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    test_split: str | None = HfArg(
        default=None,
        help="Split to evaluate on, not to train or calibrate on; default: test, else validation, else a part of the "
        "training data.",
    )
    test_fraction: float = HfArg(
        default=0.2, help="That part, of every route and label alike, drawn by --seed, if there is no test split."
    )
    max_train_samples: int | None = HfArg(
        default=None, help="Draw this many training samples by seed; for labels tickets, equally many of each route."
    )
    max_test_samples: int | None = HfArg(default=None, help="Draw this many test samples by seed.")
    image_size: int | None = HfArg(
        default=None, help="Side of images; default: the backbone's, and of one that starts from scratch the images'."
    )
    num_channels: int | None = HfArg(default=None, help="1 for grey, 3 for colour; default: 3.")
    mean: float | None = HfArg(
        default=None, help="Subtracted from pixels scaled to [0, 1]; default: the backbone's, or .5."
    )
    std: float | None = HfArg(default=None, help="Divisor of pixels after that; default: the backbone's, or .5.")
    augmentation: str = HfArg(
        default="none",
        metadata={"choices": AUGMENTATIONS},
        help="Changes of training images, drawn anew at every use: flip left and right; crop: also shift by an "
        "eighth; randaugment: also torchvision's RandAugment; timm: crops of any scale, flips and "
        "colours, as timm trains.",
    )
    max_seconds: float = HfArg(default=1.0, help="Length of sounds: longer ones are cut, shorter ones padded.")
    max_length: int = HfArg(default=128, help="Tokens of a text; longer texts are cut, or split for --pack.")
    pack: bool = HfArg(
        default=True, help="For causal and masked models: join the texts of a route into samples of --max_length."
    )
    in_memory: bool = HfArg(default=False, help="Hold the decoded samples in memory. The results are the same.")
    check_files: bool = HfArg(default=False, help="Decode all images and sounds before training, not their headers.")
    skip_unreadable: bool = HfArg(default=False, help="The same, and leave out those that cannot be decoded.")

    def on_card(self) -> dict[str, str]:
        """The fields of a model card on the data; none if the data are a folder of this machine."""
        if self.dataset == "digits":
            return {"dataset_name": "scikit-learn's digits, every fifth image", "dataset_split": "test"}
        if Path(self.dataset).expanduser().exists():
            return {}
        fields = {"datasets": self.dataset, "dataset_split": self.test_split or "test"}
        return fields if self.config_name is None else {**fields, "dataset_config": self.config_name}

    def save(self, folder: str | Path, backbone: str) -> None:
        """Writes the arguments, and the backbone that the samples were prepared for, into `data.json`."""
        (Path(folder) / "data.json").write_text(json.dumps({"backbone": backbone, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> tuple[DataArguments, str]:
        """The arguments, and the backbone, that `save` wrote."""
        saved = json.loads((Path(folder) / "data.json").read_text())
        backbone = saved.pop("backbone")
        return cls(**saved), backbone
