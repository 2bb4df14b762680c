"""What `recipes/prune.py` reads of the files of a user, up to the tensors, and what it refuses in them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from scipy.signal import resample_poly
from timm.data import create_transform
from transformers import EvalPrediction, ViTImageProcessor

from hf_rtl.training.randomness import seeded
from shared.arguments import BadInput
from shared.check_rows import readable, routes_by_labels, warnings_of
from shared.data_arguments import DataArguments
from shared.inputs import Inputs, decoder, is_timm_name, make_inputs, picture
from shared.prepare import token_accuracy
from shared.rows import Rows, load_rows
from tests.recipes.small_files import (
    RATE,
    language_tokenizer,
    save_backbone,
    save_csv,
    save_image,
    save_images,
    save_jsonl,
    save_sound,
    tone,
)
from tests.recipes.small_texts import WORDS
from tests.training.small_runs import SMALL_NET


CELLS = {("cat", "north"): 4, ("cat", "süd"): 3, ("dög", "north"): 2, ("dög", "süd"): 5}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer of words, with an end of texts and a mask."""
    folder = tmp_path_factory.mktemp("tokenizer")
    language_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def audio(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone("audio", tmp_path_factory.mktemp("audio"))


def load(dataset: object, route_column: str | None = None, **values: Any) -> Rows:
    return load_rows(DataArguments(dataset=str(dataset), **values), route_column=route_column, seed=0)


def checked(dataset: object, route_column: str | None = None, **values: Any) -> tuple[Rows, list[str]]:
    arguments = DataArguments(dataset=str(dataset), **values)
    rows = load_rows(arguments, route_column=route_column, seed=0)
    return readable(rows, arguments, decoder(rows, arguments))


def inputs_of(dataset: object, backbone: str, route_column: str | None = None, **values: Any) -> Inputs:
    arguments = DataArguments(dataset=str(dataset), **values)
    return make_inputs(load_rows(arguments, route_column=route_column, seed=0), arguments, backbone)


@pytest.mark.parametrize("processor", [None, "bicubic"])
def test_timm_changes_images_as_it_trains(tmp_path: Path, processor: str | None) -> None:
    """At the size of the processor, with its mean, deviation and interpolation; test images stay whole."""
    root, backbone = save_images(tmp_path / "scans", CELLS), SMALL_NET
    own: dict[str, Any] = {"image_size": 24, "mean": 0.2, "std": 0.4}
    expected = {"mean": (0.2,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear"}
    if processor is not None:
        own, backbone = {}, str(tmp_path / "vit")
        size = {"height": 24, "width": 24}
        ViTImageProcessor(size=size, resample=3, image_mean=[0.3] * 3, image_std=[0.6] * 3).save_pretrained(backbone)
        expected = {"mean": (0.3,) * 3, "std": (0.6,) * 3, "interpolation": "bicubic"}
    inputs = inputs_of(root, backbone, **own, augmentation="timm")
    image = picture(load(root).train[0]["image"], 3)

    def drawn(make: Callable[[], torch.Tensor], seed: int) -> torch.Tensor:
        with seeded((seed,), torch.device("cpu")):
            return make()

    timm_itself = create_transform((3, 24, 24), is_training=True, **expected)
    found = [drawn(lambda: inputs.train[0]["pixel_values"], seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0], drawn(lambda: timm_itself(image), 1)) and found[0].shape == (3, 24, 24)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    whole = inputs_of(root, backbone, **own)
    assert torch.equal(inputs.test[0]["pixel_values"], whole.test[0]["pixel_values"])


def names(data: Dataset, column: str) -> list[str]:
    return data.features[column].int2str(data[column][:])


def said_of(data: Dataset) -> list[tuple[str, str, str]]:
    """(file, label, hospital) of every sample."""
    files = [Path(value["path"]).parts for value in data["image"]]
    return [
        ("/".join(file[-2:]), *of_row)
        for file, *of_row in zip(files, names(data, "label"), names(data, "hospital"), strict=True)
    ]


def on_disk(root: Path) -> dict[str, str]:
    """file -> hospital, as a reader of the metadata.csv alone sees it."""
    lines = (root / "metadata.csv").read_text().splitlines()[1:]
    return dict(line.split(",") for line in lines)


# Images


def test_images_have_the_class_of_their_folder_and_the_route_of_the_metadata(tmp_path: Path) -> None:
    rows = load(save_images(tmp_path / "scans", CELLS), "hospital")
    assert (rows.task, rows.ticket_task, rows.input_column, rows.route_column) == (
        *("image", "labels", "image", "hospital"),
    )
    assert (rows.label_names, rows.route_names) == (["cat", "dög"], ["north", "süd"])
    both = said_of(rows.train) + said_of(rows.test)
    assert sorted(both) == sorted(
        (file, file.split("/")[0], hospital) for file, hospital in on_disk(tmp_path / "scans").items()
    )
    # Without a route column, a ticket per class.
    rows = load(tmp_path / "scans")
    assert (rows.ticket_task, rows.route_column, rows.route_names) == ("membership", "label", ["cat", "dög"])


def test_folders_of_splits_have_a_metadata_each_or_one_beside_them(tmp_path: Path) -> None:
    root = save_images(tmp_path / "each", CELLS, folder="train")
    save_images(root, {("dög", "süd"): 2}, folder="test")
    each = load(root, "hospital")
    assert said_of(each.train) == sorted(
        (file, file.split("/")[0], hospital) for file, hospital in on_disk(root / "train").items()
    )
    # One class alone in the test folder, which is still the class of the training data.
    assert said_of(each.test) == [("dög/000.png", "dög", "süd"), ("dög/001.png", "dög", "süd")]
    assert each.test["label"][:] == [1, 1]

    one = tmp_path / "one"
    shutil.copytree(root, one)
    rows = []
    for split in ("train", "test"):
        rows += [{"file_name": f"{split}/{file}", "hospital": name} for file, name in on_disk(one / split).items()]
        (one / split / "metadata.csv").unlink()
    save_csv(one / "metadata.csv", rows)
    beside = load(one, "hospital")
    assert [said_of(part) for part in (beside.train, beside.test)] == [
        said_of(part) for part in (each.train, each.test)
    ]


@pytest.mark.parametrize("split", ["validation", "val"])
def test_other_names_of_the_test_split_are_known(tmp_path: Path, split: str) -> None:
    save_images(tmp_path, CELLS, folder="train")
    save_images(tmp_path, {("cat", "north"): 1}, folder=split)
    assert len(load(tmp_path, "hospital").test) == 1


def test_a_folder_beside_that_of_a_split_is_not_left_out_silently(tmp_path: Path) -> None:
    for label in ("train", "plane"):
        save_image(tmp_path / label / "1.png", 100)
    with pytest.raises(BadInput, match=r"has the folder 'train' of a split, and files outside it.*plane/1.png"):
        load(tmp_path)


def test_metadata_of_other_systems(tmp_path: Path) -> None:
    """Excel's semicolons and byte order mark, Windows' backslashes, macOS's spelling and hidden files, capitals."""
    for name in ("é/1.PNG", "é/2.png", "b/1.png", "b/2.png", "b/3.png"):
        save_image(tmp_path / name, 100)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "b" / "._1.png").write_bytes(b"\0")
    (tmp_path / "notes.txt").write_text("read me\n")
    rows = [
        {"file_name": name, "label": label, "site": site}
        for name, label, site in [
            ("e\u0301\\1.PNG", "NA", 2),
            ("./e\u0301/2.png", "NA", 10),
            ("b\\1.png", "None", 2),
            ("b/2.png", "None", 10),
            ("b/3.png", "None", 10),
        ]
    ]
    save_csv(tmp_path / "metadata.csv", rows, separator=";", encoding="utf-8-sig")
    loaded = load(tmp_path, "site")
    # The metadata's label replaces that of the folder. Sites are sorted as numbers.
    assert (loaded.label_names, loaded.route_names) == (["NA", "None"], ["2", "10"])
    assert (len(loaded.train), names(loaded.test, "label"), names(loaded.test, "site")) == (4, ["None"], ["10"])


def test_integers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for label in ("2", "10", "-1"):
        for number in range(2):
            save_image(tmp_path / "folders" / label / f"{number}.png", 100)
    assert load(tmp_path / "folders").route_names == ["-1", "2", "10"]
    rows = [{"text": f"word {index}", "label": label} for index, label in enumerate([10, 2, 9, 10, 2, 9])]
    assert load(save_csv(tmp_path / "a.csv", rows)).label_names == ["2", "9", "10"]


def test_metadata_without_a_row_or_a_column_is_refused_by_name(tmp_path: Path) -> None:
    root = save_images(tmp_path, CELLS)
    save_image(root / "cat" / "new.png", 100)
    with pytest.raises(BadInput, match=r"metadata.csv' has no row whose file_name is 'cat/new.png'"):
        load(root)
    (root / "metadata.csv").write_text("file,hospital\ncat/new.png,north\n")
    with pytest.raises(BadInput, match="needs a column 'file_name'; it has file, hospital"):
        load(root)
    (root / "metadata.csv").write_text("")
    with pytest.raises(BadInput, match=r"metadata.csv' cannot be read: No columns"):
        load(root)
    save_csv(root / "metadata.csv", [{"file_name": "cat/new.png", "hospital": ""}])
    shutil.rmtree(root / "dög")
    for file in (root / "cat").glob("0*.png"):
        file.unlink()
    save_image(root / "cat" / "new2.png", 100)
    with (root / "metadata.csv").open("a") as file:
        file.write("cat/new2.png,north\n")
    with pytest.raises(BadInput, match="column 'hospital' has no value at sample 0"):
        load(root, "hospital")


def test_a_table_may_have_the_paths_of_files(tmp_path: Path) -> None:
    for number in range(4):
        save_image(tmp_path / "files" / f"{number}.png", 40 * number)
    rows = [{"file": f"files/{number}.png", "label": "ab"[number % 2]} for number in range(4)]
    table = save_csv(tmp_path / "table.csv", rows)
    loaded = load(table, task="image", input_column="file", test_fraction=0.5)
    for data in (loaded.train, loaded.test):
        for value, label in zip(data["file"], names(data, "label"), strict=True):
            assert label == "ab"[int(Path(value["path"]).stem) % 2] and picture(value, 3).size == (12, 8)
    with pytest.raises(BadInput, match="which column holds the samples.*--task image or audio"):
        load(table)


def test_parquet_of_bytes_without_features(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 100)
    raw = (tmp_path / "1.png").read_bytes()
    for name, value in (("struct", {"bytes": raw, "path": "1.png"}), ("binary", raw)):
        data = Dataset.from_dict({"scan": [value] * 4, "label": list("abab")})
        data.to_pandas().to_parquet(tmp_path / f"{name}.parquet")
        rows = load(tmp_path / f"{name}.parquet", task="image", input_column="scan")
        assert picture(rows.train[0]["scan"], 1).size == (12, 8)


def test_pictures_are_as_they_are_seen(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
    grey = (pixels >> 8).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey, np.full_like(grey, 9)], axis=2)).save(tmp_path / "alpha.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # turned to the right
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=turned)
    for name, expected in {
        **dict.fromkeys(("deep", "grey", "alpha", "palette"), grey),
        "turned": np.rot90(grey, -1),
    }.items():
        for channels in (1, 3):
            image = np.asarray(picture({"path": str(tmp_path / f"{name}.png"), "bytes": None}, channels))
            wanted = expected if channels == 1 else np.repeat(expected[..., None], 3, axis=2)
            assert np.array_equal(image, wanted), name


def test_images_become_pixels_held_in_memory_or_not(tmp_path: Path) -> None:
    root = save_images(tmp_path, CELLS)
    options: dict[str, Any] = {"image_size": 8, "num_channels": 1, "mean": 0.25, "std": 0.5}
    at_use, held = (inputs_of(root, SMALL_NET, "hospital", in_memory=flag, **options) for flag in (False, True))
    for first, second in ((at_use.train, held.train), (at_use.test, held.test)):
        assert first["label"][:] == second["label"][:].tolist()
        assert first["hospital"][:] == second["hospital"][:].tolist()
        for one, other in zip(first, second, strict=True):
            assert one["pixel_values"].shape == (1, 8, 8) and torch.equal(one["pixel_values"], other["pixel_values"])
    rows = load(root, "hospital")
    image = picture(rows.train[0]["image"], 1).resize((8, 8), Image.Resampling.BILINEAR)
    expected = (np.asarray(image, dtype=np.float64) / 255 - 0.25) / 0.5
    assert np.allclose(at_use.train[0]["pixel_values"][0], expected, atol=1e-5)


def test_a_timm_name_is_from_scratch_and_a_repository_of_timm_is_not() -> None:
    assert is_timm_name("resnet18") and is_timm_name("resnet18.a1_in1k")
    assert not is_timm_name("timm/resnet18.a1_in1k")


# Held out, copies, tables


def test_without_a_test_split_a_part_of_every_cell_is_held_out(tmp_path: Path) -> None:
    cells = {("cat", "north"): 10, ("cat", "south"): 3, ("dog", "north"): 1, ("dog", "south"): 7}
    root = save_images(tmp_path, cells)
    rows = load(root, "hospital", test_fraction=0.3)
    naive = {cell: min(number - 1, max(1, round(0.3 * number))) for cell, number in cells.items()}
    assert Counter(said[1:] for said in said_of(rows.test)) == Counter({c: n for c, n in naive.items() if n})
    assert Counter(said[1:] for said in said_of(rows.train)) == Counter({c: cells[c] - naive[c] for c in cells})
    again = load(root, "hospital", test_fraction=0.3)
    other = load_rows(DataArguments(dataset=str(root), test_fraction=0.3), route_column="hospital", seed=1)
    assert said_of(again.test) == said_of(rows.test) != said_of(other.test)
    with pytest.raises(BadInput, match=r"--test_fraction must be between 0 and 1, got 1\.5"):
        load(root, test_fraction=1.5)


def test_the_table_counts_routes_by_labels_and_notes_what_is_rare(tmp_path: Path) -> None:
    root = save_images(tmp_path, {("cat", "north"): 6, ("dog", "south"): 7, ("dog", "west"): 1}, folder="train")
    save_images(root, {("cat", "north"): 2, ("dog", "south"): 1}, folder="test")
    shutil.copy(root / "train/cat/001.png", root / "test/cat/000.png")
    rows = load(root, "hospital")
    assert routes_by_labels(rows) == [
        {"route": "north", "training samples": 6, "of cat": 6, "of dog": 0, "test samples": 2},
        {"route": "south", "training samples": 7, "of cat": 0, "of dog": 7, "test samples": 1},
        {"route": "west", "training samples": 1, "of cat": 0, "of dog": 1, "test samples": 0},
    ]
    assert warnings_of(rows) == [
        "3 pairs of route and label have no training samples: 'north' of 'dog', 'south' of 'cat', 'west' of 'cat'.",
        "1 pairs of route and label have fewer than 5 training samples: 'west' of 'dog'.",
        "1 routes have no test sample, so their tickets are not measured: 'west'.",
        "1 of 3 test samples are training samples too, which flatters: test sample 0 is training sample 1.",
    ]


def test_save_to_disk_keeps_names_and_splits(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "site": Value("int64")})
    data = Dataset.from_dict({"text": list("abcdef"), "label": [1, 0] * 3, "site": [10, 10, 10, 9, 9, 9]}, features)
    # A format is saved too, and must not hide columns.
    data.with_format("torch", columns=["label"]).save_to_disk(tmp_path / "one")
    one = load(tmp_path / "one", "site", test_fraction=0.5)
    assert (one.label_names, one.route_names, one.task) == (["no", "yes"], ["9", "10"], "text")
    assert sorted(one.train["text"][:] + one.test["text"][:]) == list("abcdef")
    DatasetDict(train=data, test=data.select([2, 3])).save_to_disk(tmp_path / "two")
    two = load(tmp_path / "two", "site")
    assert two.train["text"][:] == list("abcdef") and two.test["text"][:] == ["c", "d"]
    assert two.test["label"][:] == [1, 0] and two.test["site"][:] == [1, 0]


def test_of_two_columns_of_files_one_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 100)
    save_sound(tmp_path / "1.wav", tone(0.1, 40))
    given = {"photo": [str(tmp_path / "1.png")] * 4, "clip": [str(tmp_path / "1.wav")] * 4, "label": list("abab")}
    data = Dataset.from_dict({**given, "caption": list("wxyz")})
    data = data.cast_column("photo", datasets.Image()).cast_column("clip", Audio(decode=False))
    data.save_to_disk(tmp_path / "both")
    with pytest.raises(BadInput, match=r"which column holds the samples\? The data have photo, clip, label, caption"):
        load(tmp_path / "both")
    assert load(tmp_path / "both", task="audio").input_column == "clip"
    assert load(tmp_path / "both", input_column="photo").task == "image"
    assert load(tmp_path / "both", input_column="caption").task == "text"
    # Only what is needed is kept, so that no column is taken for an input.
    assert set(load(tmp_path / "both", task="image").train.column_names) == {"photo", "label"}
    with pytest.raises(BadInput, match="column 'photo' has image files, which --task audio cannot use"):
        load(tmp_path / "both", task="audio", input_column="photo")


# Texts


def test_a_csv_of_texts_with_a_domain(tmp_path: Path) -> None:
    rows = [
        {"text": f"good; film {index}", "label": "ja" if index % 2 else "nein", "domain": "ab"[index // 4]}
        for index in range(8)
    ]
    for options in ({}, {"separator": ";", "encoding": "utf-8-sig"}, {"separator": "\t"}):
        loaded = load(save_csv(tmp_path / "a.csv", rows, **options), "domain", test_fraction=0.5)
        assert (loaded.task, loaded.ticket_task) == ("text", "labels")
        assert (loaded.label_names, loaded.route_names) == (["ja", "nein"], ["a", "b"])
        found = [
            dict(zip(("text", "label", "domain"), sample, strict=True))
            for part in (loaded.train, loaded.test)
            for sample in zip(part["text"], names(part, "label"), names(part, "domain"), strict=True)
        ]
        assert sorted(found, key=lambda row: row["text"]) == rows and len(loaded.test) == 4


def test_the_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    for name in ("train-1.csv", "train-2.csv", "test.CSV", "valley.csv"):
        save_csv(tmp_path / name, [{"text": f"{name} {label}", "label": label} for label in "ab"])
    (tmp_path / "README.md").write_text("no table\n")
    loaded = load(tmp_path)
    assert loaded.train["text"][:] == ["train-1.csv a", "train-1.csv b", "train-2.csv a", "train-2.csv b"]
    assert loaded.test["text"][:] == ["test.CSV a", "test.CSV b"]


LABELS = {
    "booleans": ([True, False, True, False], ["False", "True"]),
    "whole floats": ([2.0, 10.0, 2.0, 10.0], ["2", "10"]),
    "strings of integers": (["10", "9", "10", "9"], ["9", "10"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_type_are_named(tmp_path: Path, kind: str) -> None:
    values, expected = LABELS[kind]
    texts = ["a", "b", "c", "d"]
    Dataset.from_dict({"text": texts, "label": values}).to_parquet(tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet", test_fraction=0.5)
    assert rows.label_names == expected
    for part in (rows.train, rows.test):
        for text, label in zip(part["text"], names(part, "label"), strict=True):
            value = values[texts.index(text)]
            assert label == (str(value) if isinstance(value, (bool, str)) else f"{value:g}")


BAD_LABELS = {
    "None": ["a", None, "b", "a"],
    "no value": ["a", "", "b", "a"],
    "fractions": [0.5, 1.5, 0.5, 1.0],
    "lists": [["a"], ["b"], ["a"], ["b"]],
}
REASONS = {
    "None": "column 'label' has no value at sample 1",
    "no value": "column 'label' has no value at sample 1",
    "fractions": r"column 'label' has 0\.5, which is no name of a class or route; --class_bounds",
    "lists": r"column 'label' has \['a'\], which is no name",
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, kind: str) -> None:
    data = Dataset.from_dict({"text": list("abcd"), "label": BAD_LABELS[kind], "site": list("xxyy")})
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=REASONS[kind]):
        load(tmp_path / "a.parquet", "site")


def test_a_route_that_is_the_label_asks_for_membership(tmp_path: Path) -> None:
    rows = [{"text": str(index), "species": "ab"[index % 2]} for index in range(4)]
    loaded = load(save_csv(tmp_path / "a.csv", rows), "species", task="text")
    assert (loaded.ticket_task, loaded.route_names) == ("membership", ["a", "b"])


@pytest.mark.parametrize(
    ("columns", "values", "expected"),
    [
        ({"text": "t", "site": "s"}, {}, "texts without a column 'label' admit several tasks"),
        ({"x": "t", "site": "s"}, {}, "which column holds the samples\\? The data have x, site"),
        ({"text": "t", "label": "l"}, {"route": "town"}, "no column 'town'; it has text, label.*--route_column"),
        (
            {"text": "t", "label": "s", "kind": "l"},
            {"route": "label", "label_column": "kind"},
            "'label' has the routes and",
        ),
        (
            {"text": "t", "label": "s"},
            {"route": "label", "task": "causal"},
            "the column 'label' has the routes",
        ),
        ({"text": "t"}, {"task": "causal"}, "the data do not say the route of a sample.*--cluster_routes 4"),
    ],
)
def test_columns_that_do_not_say_enough_are_refused(
    tmp_path: Path, columns: dict, values: dict, expected: str
) -> None:
    file = save_csv(
        tmp_path / "a.csv", [{name: f"{value}{i % 2}" for name, value in columns.items()} for i in range(6)]
    )
    route = values.pop("route", None)
    with pytest.raises(BadInput, match=expected):
        load(file, route, **values)


# Tokens and language models


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path, tokenizer: str) -> None:
    samples = [
        {"tags": ["O", "THING", "O"], "tokens": ["good", "film-plot", "so"], "site": "a"},
        {"tags": ["THING"], "tokens": ["cable"], "site": "b"},
        {"tags": ["O", "O"], "tokens": ["so", "so-so-so"], "site": "a"},
        {"tags": [None, "THING"], "tokens": ["fine", "phone"], "site": "b"},
    ]
    file = save_jsonl(tmp_path / "a.jsonl", samples)
    made = inputs_of(file, tokenizer, "site", test_fraction=0.5)
    assert made.options == {"id2label": {0: "O", 1: "THING"}, "label2id": {"O": 0, "THING": 1}}
    split = language_tokenizer()
    expected = {}
    for sample in samples:
        ids, labels = [2], [-100]
        for word, tag in zip(sample["tokens"], sample["tags"], strict=True):
            pieces = split(word, add_special_tokens=False)["input_ids"]
            ids += pieces
            labels += [-100 if tag is None else ["O", "THING"].index(tag), *[-100] * (len(pieces) - 1)]
        expected[(*ids, 3)] = [*labels, -100]
    rows = [row for part in (made.train, made.test) for row in part]
    assert {tuple(row["input_ids"]): row["labels"] for row in rows} == expected and len(rows) == 4
    assert made.train.column_names.count("site") == 1 and "tags" not in made.train.column_names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": ["so"], "tags": ["O", "O"]}, "sample 0 needs words in 'tokens', each with a label in 'tags'"),
        ({"tokens": ["so"], "tags": ["NEW"]}, r"that training data have \(O, THING\); it has \['so'\] and \['NEW'\]"),
        ({"tokens": [], "tags": []}, "needs words"),
        ({"tokens": ["so"]}, "needs words.*and None"),
    ],
)
def test_words_without_a_label_are_refused(tmp_path: Path, tokenizer: str, wrong: dict, message: str) -> None:
    good = [{"tokens": ["so", "film"], "tags": ["O", "THING"], "site": site} for site in "ab"]
    save_jsonl(tmp_path / "train.jsonl", good)
    save_jsonl(tmp_path / "test.jsonl", [{**wrong, "site": "a"}, *good])
    with pytest.raises(BadInput, match=message):
        inputs_of(tmp_path, tokenizer, "site")


def packed(texts: list[tuple[str, str]], length: int) -> list[tuple[str, list[int]]]:
    """Blocks of one route each, in an independent way: token by token."""
    ids = {word: 4 + index for index, word in enumerate(WORDS)}
    blocks: list[tuple[str, list[int]]] = []
    for route in dict.fromkeys(route for _, route in texts):
        block: list[int] = []
        for text, of_text in texts:
            for token in [*(ids[word] for word in text.split()), 14] * (of_text == route):
                block.append(token)
                if len(block) == length:
                    blocks.append((route, block))
                    block = []
    return blocks


def language_samples(number: int) -> list[dict[str, str]]:
    generator = np.random.default_rng(number)
    return [
        {
            "text": " ".join(generator.choice(WORDS, generator.integers(1, 7))),
            "site": "ab"[int(generator.integers(2))],
            "label": "not used",
        }
        for _ in range(number)
    ]


@pytest.mark.parametrize("task", ["causal", "masked"])
def test_blocks_of_tokens_never_mix_routes(tmp_path: Path, tokenizer: str, task: str) -> None:
    samples = {name: language_samples(number) for name, number in (("train", 40), ("test", 20))}
    for name, of_split in samples.items():
        save_jsonl(tmp_path / f"{name}.jsonl", of_split)
    made = inputs_of(tmp_path, tokenizer, "site", task=task, max_length=8)
    for name, data in (("train", made.train), ("test", made.test)):
        blocks = packed([(sample["text"], sample["site"]) for sample in samples[name]], 8)
        assert names(data.with_format(None), "site") == [route for route, _ in blocks]
        for row, (_, block) in zip(data, blocks, strict=True):
            given, labels = (torch.as_tensor(row[column]) for column in ("input_ids", "labels"))
            if task == "causal":
                assert given.tolist() == labels.tolist() == block
            else:
                hidden = labels != -100
                assert torch.where(hidden, labels, given).tolist() == block
    if task == "masked":
        hidden = [(row["labels"] != -100).float().mean().item() for row in made.train]
        assert 0.05 < np.mean(hidden) < 0.3
        # Hidden anew at every use in training, once in testing.
        train, test = (
            [[row["input_ids"].tolist() for row in data] for _ in range(2)] for data in (made.train, made.test)
        )
        assert train[0] != train[1] and test[0] == test[1]


def test_texts_that_are_not_packed_are_cut(tmp_path: Path, tokenizer: str) -> None:
    samples = language_samples(40)
    made = inputs_of(
        save_jsonl(tmp_path / "a.jsonl", samples), tokenizer, "site", task="causal", max_length=5, pack=False
    )
    ids = {word: 4 + index for index, word in enumerate(WORDS)}
    whole = [[2, *(ids[word] for word in sample["text"].split()), 3] for sample in samples]
    expected = sorted(tokens[:5] for tokens in whole if len(tokens) >= 5)
    assert sorted(made.train["input_ids"][:].tolist() + made.test["input_ids"][:].tolist()) == expected


def test_a_route_without_a_block_is_refused(tmp_path: Path, tokenizer: str) -> None:
    file = save_jsonl(tmp_path / "a.jsonl", language_samples(12))
    with pytest.raises(BadInput, match="route '[ab]' has no 100 tokens; lower --max_length"):
        inputs_of(file, tokenizer, "site", task="causal", max_length=100)


def test_the_lines_of_a_text_are_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good film\n\n  \nbad plot\nso fine\n")
    rows = load(tmp_path / "a.txt", task="causal", cluster_routes=2)
    assert sorted(rows.train["text"][:] + rows.test["text"][:]) == ["bad plot", "good film", "so fine"]
    assert (rows.ticket_task, rows.route_column, rows.label_names) == ("labels", "route", [])


def test_accuracy_counts_the_tokens_of_every_route() -> None:
    predicted = np.array([[1, 2, 3], [1, 1, 1], [9, 9, 9]])
    labels = np.array([[1, 2, 4], [-100, 1, 2], [9, -100, -100]])
    given = {"route_ids": np.array([0, 1, 1]), "route_names": ["a", "b", "untested"]}
    found = token_accuracy(EvalPrediction(predicted, labels), **given, shifted=False)
    assert found == pytest.approx(
        {
            **{"a/accuracy": 2 / 3, "b/accuracy": 2 / 3, "accuracy": 4 / 6},
            **{"mean_route_accuracy": 2 / 3, "worst_route_accuracy": 2 / 3},
        }
    )
    # A causal model says at each position what comes next: 1 -> 2, 2 -> 4; 1 -> 1, 1 -> 2.
    found = token_accuracy(EvalPrediction(predicted, labels), **given, shifted=True)
    assert (found["a/accuracy"], found["b/accuracy"], found["accuracy"]) == (0, 0.5, 0.25)


def test_a_seq2seq_model_has_texts_on_both_sides(tmp_path: Path, tokenizer: str) -> None:
    samples = [{"text": f"good {thing}", "to": f"fine {thing} so", "site": thing} for thing in ("film", "phone")] * 2
    file = save_jsonl(tmp_path / "a.jsonl", samples)
    made = inputs_of(file, tokenizer, "site", task="seq2seq", target_column="to", max_length=4)
    ids = {word: 4 + index for index, word in enumerate(WORDS)}
    for row in (*made.train, *made.test):
        thing = ["film", "phone"][row["site"]]
        assert row["input_ids"] == [2, ids["good"], ids[thing], 3]
        assert row["labels"] == [2, ids["fine"], ids[thing], 3]  # cut
    with pytest.raises(BadInput, match="a seq2seq model needs --target_column NAME"):
        inputs_of(file, tokenizer, "site", task="seq2seq")
    with pytest.raises(BadInput, match="no column 'answer'; it has text, to, site.*--target_column"):
        inputs_of(file, tokenizer, "site", task="seq2seq", target_column="answer")
    save_jsonl(tmp_path / "a.jsonl", [*samples, {"text": "good", "site": "film"}])
    with pytest.raises(BadInput, match="column 'to' has None at sample"):
        inputs_of(file, tokenizer, "site", task="seq2seq", target_column="to")


# Sounds


def save_sounds(root: Path) -> dict[str, np.ndarray]:
    """Sounds of two classes and two sites. Returns file -> the samples at `RATE` that a reader must get."""
    expected, rows = {}, []
    for index, (label, site) in enumerate([("low", "a"), ("low", "b"), ("high", "a"), ("high", "b")] * 2):
        name, rate = f"{label}/{index}.wav", (RATE, 2 * RATE)[index % 3 == 1]
        samples = tone(0.3 + 0.1 * index, 40 if label == "low" else 200, rate)
        if index == 4:  # stereo
            save_sound(root / name, np.stack([samples, np.zeros_like(samples)], axis=1), rate, channels=2)
            samples = samples / 2
        else:
            save_sound(root / name, samples, rate)
        expected[name] = resample_poly(samples, 1, rate // RATE)
        rows.append({"file_name": name, "site": site})
    save_csv(root / "metadata.csv", rows)
    return expected


def test_sounds_have_one_length_and_rate(tmp_path: Path, audio: str) -> None:
    expected = save_sounds(tmp_path / "sounds")
    rows = load(tmp_path / "sounds", "site")
    assert (rows.task, rows.label_names, rows.route_names) == ("audio", ["high", "low"], ["a", "b"])
    at_use, held = (
        inputs_of(tmp_path / "sounds", audio, "site", max_seconds=0.5, in_memory=flag) for flag in (False, True)
    )
    for part, first, second in ((rows.train, at_use.train, held.train), (rows.test, at_use.test, held.test)):
        for value, one, other in zip(part["audio"], first, second, strict=True):
            samples = expected["/".join(Path(value["path"]).parts[-2:])][:500]
            whole = np.pad(samples, (0, 500 - len(samples)))
            whole = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-7)
            assert one["input_values"].shape == (500,)
            assert np.allclose(one["input_values"], whole, atol=2e-3)
            assert torch.equal(one["input_values"], other["input_values"])
        assert first["label"][:] == second["label"][:].tolist()


def test_parquet_of_sounds(tmp_path: Path) -> None:
    save_sound(tmp_path / "1.wav", tone(0.1, 40))
    raw = (tmp_path / "1.wav").read_bytes()
    data = Dataset.from_dict({"clip": [{"bytes": raw, "path": None}] * 4, "label": list("abab")})
    data.cast_column("clip", Audio(decode=False)).to_parquet(tmp_path / "a.parquet")
    rows, said = checked(tmp_path / "a.parquet", check_files=True)
    assert rows.task == "audio" and said == []


# Files that cannot be read


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Images of which one is no image, and one has a good header and half a body."""
    root = save_images(tmp_path / "scans", CELLS)
    whole = (root / "cat/002.png").read_bytes()
    (root / "cat/002.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_a_broken_image_is_named_or_left_out(broken: Path) -> None:
    checked(broken, "hospital")  # its header is fine
    with pytest.raises(BadInput, match=r"1 files cannot be read: '002.png' \(.*\)\. Mend them.*--skip_unreadable"):
        checked(broken, "hospital", check_files=True)
    (broken / "dög/007.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="1 files cannot be read: '007.png'"):
        checked(broken, "hospital")
    rows, said = checked(broken, "hospital", skip_unreadable=True)
    assert len(rows.train) + len(rows.test) == sum(CELLS.values()) - 2
    assert len(said) == 1 and said[0].startswith("2 unreadable files are left out: '00")
    for file in broken.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(BadInput, match="no file of the train split can be read: '00"):
        checked(broken, "hospital", skip_unreadable=True)


def test_a_broken_sound_is_named(tmp_path: Path) -> None:
    save_sounds(tmp_path)
    (tmp_path / "low/0.wav").write_bytes(b"no sound")
    save_sound(tmp_path / "low/1.wav", np.zeros(0))
    with pytest.raises(BadInput, match=r"2 files cannot be read: .*(0.wav|1.wav).*(0.wav|1.wav)"):
        checked(tmp_path, "site")


def test_a_body_that_breaks_in_use_names_the_file_and_the_flag(broken: Path) -> None:
    made = inputs_of(broken, SMALL_NET, "hospital", image_size=8, num_channels=1)
    with pytest.raises(BadInput, match="'002.png' cannot be decoded: .*--skip_unreadable"):
        list(made.train), list(made.test)


# What is no data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "cannot be read as csv: No columns to parse"),
        ("a.csv", "text,label\n", "(is empty|cannot be read)"),
        ("a.csv", "text,label\na,b\nc,d,e\n", "cannot be read as csv: Error tokenizing"),
        ("a.jsonl", '{"text": "a"\n', "cannot be read as json"),
        ("a.parquet", "x", "cannot be read as parquet"),
        ("a.docx", "x", r"holds nothing that can be read: its suffixes are \.docx"),
        ("a.png", "x", r"holds nothing that can be read: its suffixes are \.png"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        load(tmp_path / name)


def test_what_is_no_folder_of_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="its suffixes are no files"):
        load(tmp_path / "empty")
    with pytest.raises(BadInput, match=r"nothere.csv' is no file or folder here"):
        load(tmp_path / "nothere.csv")
    save_csv(tmp_path / "data" / "test.csv", [{"text": "a", "label": "b"}])
    with pytest.raises(BadInput, match="has no split 'train'; it has test"):
        load(tmp_path / "data")


@pytest.mark.parametrize(("column", "value"), [("label", "new"), ("site", "new")])
def test_what_only_the_test_split_has_is_refused(tmp_path: Path, column: str, value: str) -> None:
    rows = [{"text": str(index), "label": "ab"[index % 2], "site": "xy"[index // 2]} for index in range(4)]
    save_csv(tmp_path / "train.csv", rows)
    save_csv(tmp_path / "test.csv", [{**rows[0], column: value}])
    with pytest.raises(BadInput, match=f"column '{column}' of the test data has 'new'; the training data have"):
        load(tmp_path, "site")
