"""The commands of `hf-rtl` that read: inspect and similarity, on small saved models."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from hf_rtl import ByColumn, RTLModel, RTLModelForImageClassification, save_rule
from hf_rtl.analysis import expected_jaccard_of_layers
from hf_rtl_cli.main import main
from hf_rtl_cli.models import load_model
from hf_rtl_cli.tables import fraction


ROUTES = ["cat", "dog", "owl"]
EMPTY = 5  # a weight in which the ticket of the owl keeps nothing


def make_model(route_names=ROUTES, backbone="test_resnet", **options) -> RTLModelForImageClassification:
    """Tickets of densities from .2 to .6."""
    options = {"ticket_task": "membership", "seed": 0, **options}
    model = RTLModelForImageClassification.from_backbone(backbone, route_names=route_names, **options)
    generator = torch.Generator().manual_seed(0)
    for route, density in enumerate(torch.linspace(0.2, 0.6, len(route_names))):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < density for shape in model.mask_bank.shapes]
    return model


@pytest.fixture(scope="module")
def model() -> RTLModelForImageClassification:
    model = make_model()
    masks = model.mask_bank["owl"]
    masks[EMPTY].zero_()
    model.mask_bank["owl"] = masks
    model.config.thresholds = [0.25, -1.5, 2.0]
    return model


@pytest.fixture(scope="module")
def saved(model: RTLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests must leave as it is."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}\n')
    (folder / "training_args.json").write_text("{}\n")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`call("inspect", folder)` returns the output on a terminal of 120 columns, or with `--json` its values."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed, parse_constant=pytest.fail) if "--json" in arguments else printed

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture, tmp_path: Path):
    """`fails("inspect", folder)` returns the error, one line, and checks that nothing in `tmp_path` has changed."""

    def fails(*arguments):
        before = content(tmp_path)
        assert main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and content(tmp_path) == before
        names = (
            " ".join(itertools.takewhile(str.isalpha, arguments[:2])) if arguments[0] == "tickets" else arguments[0]
        )
        start, _, message = printed.err.partition(f"hf-rtl {names}: error: ")
        assert start == "" and message.count("\n") == 1 and message.endswith("\n")
        return message[:-1]

    return fails


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def find_lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.split("  ")[0].strip() == start]


def jaccard(model: RTLModel, first: str, second: str, weight: int | None = None) -> float:
    one, other = (
        torch.cat([mask.view(-1) for mask in model.mask_bank[route][_slice(weight)]]) for route in (first, second)
    )
    return int((one & other).sum()) / int((one | other).sum())


def _slice(weight: int | None) -> slice:
    return slice(None) if weight is None else slice(weight, weight + 1)


# inspect


def test_inspect_gives_the_models_own_numbers(call, model, saved):
    values = call("inspect", saved, "--json")
    masks = {route: model.mask_bank[route] for route in ROUTES}
    kept = {route: sum(int(mask.sum()) for mask in masks[route]) for route in ROUTES}
    size = sum(mask.numel() for mask in masks["cat"])
    assert (values["class"], values["backbone"]) == (
        "RTLModelForImageClassification",
        "TimmWrapperForImageClassification",
    )
    assert (values["architecture"], values["ticket_task"], values["router"]) == ("test_resnet", "membership", "given")
    assert (values["norm_statistics"], values["calibrated"], values["dtype"]) == ("per_route", True, "float32")
    assert values["hf_rtl_version"] == model.config.hf_rtl_version
    assert values["routes"] == [
        {"name": route, "kept": kept[route], "density": kept[route] / size, "threshold": threshold}
        for route, threshold in zip(ROUTES, [0.25, -1.5, 2.0], strict=True)
    ]
    assert values["num_prunable"] == size
    together = [torch.stack(layer) for layer in zip(*masks.values(), strict=True)]
    assert values["union"] == sum(int(layer.any(0).sum()) for layer in together)
    assert values["core"] == sum(int(layer.all(0).sum()) for layer in together)
    assert values["footprint"] == model.footprint()
    assert values["similarity"]["jaccard"][0][2] == pytest.approx(jaccard(model, "cat", "owl"), rel=1e-12)
    for index, weight in enumerate(values["weights"]):
        assert weight["kept"] == {route: int(masks[route][index].sum()) for route in ROUTES}
        assert weight["shape"] == list(masks["cat"][index].shape) and weight["size"] == masks["cat"][index].numel()
    assert [weight["name"] for weight in values["weights"]] == model.mask_bank.weight_names


def test_inspect_shows_the_same_numbers_to_people(call, model, saved):
    text, values = call("inspect", saved), call("inspect", saved, "--json")
    for route in values["routes"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{route['name']} ") and "█" in line]
        assert line.split()[1:4] == [f"{route['kept']:,}", f"{route['density']:.3f}", f"{route['threshold']:+.3f}"]
    for name in ("union", "core", "num_prunable"):
        assert f"{values[name]:,}" in text
    for name in ("full_bytes", "compact_bytes", "union_bytes", "independent_full_bytes"):
        assert f" {values['footprint'][name]:,} " in text
    weight = values["weights"][EMPTY]
    (line,) = [line for line in text.splitlines() if line.startswith(f"{weight['name']} ")]
    densities = [count / weight["size"] for count in weight["kept"].values()]
    assert densities[2] == 0 and line.endswith("  empty in 1")
    figures = [f"{figure:.3f}" for figure in (0, sum(densities) / 3, max(densities))]
    assert line.split()[1:5] == [f"{weight['size']:,}", *figures]
    assert line.split()[5] == "▒" * round(12 * max(densities)) + "░" * (12 - round(12 * max(densities)))


def test_inspect_of_one_route(call, model, saved):
    values = call("inspect", saved, "--route", "owl", "--json")
    assert [weight["kept"] for weight in values["weights"]] == [
        {"owl": int(mask.sum())} for mask in model.mask_bank["owl"]
    ]
    assert len(values["routes"]) == 3
    text = call("inspect", saved, "--route", "owl")
    assert "Density of the ticket 'owl' in each weight" in text
    (line,) = [line for line in text.splitlines() if line.startswith(model.mask_bank.weight_names[EMPTY])]
    assert line.endswith(f"0.000  {'░' * 12}  empty")


def test_inspect_says_how_new_data_get_their_routes(call, folder, capsys):
    assert call("inspect", folder, "--json")["rule"] is None and "new data" not in call("inspect", folder)
    save_rule(folder, ByColumn("scene\x1b", ROUTES))
    assert call("inspect", folder, "--json")["rule"] == "what its column 'scene\\x1b' says"
    assert "of new data: what its column 'scene" in call("inspect", folder)
    save_rule(folder, ByColumn("scene", ["dog", "cat", "owl"]))
    assert main(["inspect", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rule"] is None
    assert "is a rule for other routes, 'dog', 'cat', 'owl', than those of the model" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_many_routes_of_long_names_fit_the_terminal(call, tmp_path, monkeypatch, width, tiny_vit_config):
    names = [f"a place of which much could be said, as the {number}th of its kind, in rain" for number in range(40)]
    make_model(names, tiny_vit_config, ticket_task="labels").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ("inspect", "similarity"):
        text = call(command, tmp_path / "model")
        assert max(map(len, text.splitlines())) <= width
        assert "… and 20 more; --all shows them" in text and "Most similar" in text and "Least similar" in text
        everything = call(command, tmp_path / "model", "--all")
        assert "more; --all" not in everything and "All pairs" in everything
        assert len(everything.splitlines()) > 40 * 39 // 2


def test_an_output_without_blocks_gets_plain_characters(saved, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["inspect", str(saved)]) == 0
    text = output.buffer.getvalue().decode("ascii")
    assert "#" * 5 in text and "-" * 5 in text and "\\u" not in text


def test_names_from_a_file_do_not_steer_the_terminal(call, tmp_path):
    names = ["\x1b[2Jcat", "dog\nowl: 1.0", "\u202eowl"]
    make_model(names).save_pretrained(tmp_path / "model")
    for command in (["inspect"], ["similarity", "--per-layer"], ["tickets", "list"]):
        text = call(*command, tmp_path / "model")
        assert "\\x1b[2Jcat" in text and "dog\\nowl: 1.0" in text and "\\u202eowl" in text
        assert not {"\x1b", "\u202e"} & set(text) and "\nowl" not in text
    assert [route["name"] for route in call("inspect", tmp_path / "model", "--json")["routes"]] == names


def test_what_libraries_print_does_not_get_into_the_answer(call, saved, monkeypatch):
    def talkative(*arguments, **keywords):
        print("Loading the weights!")
        return load_model(*arguments, **keywords)

    monkeypatch.setattr("hf_rtl_cli.inspect.load_model", talkative)
    assert call("inspect", saved, "--json")["class"] == "RTLModelForImageClassification"


def test_a_reader_that_has_seen_enough_is_no_error(saved, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["inspect", str(saved)]) == 0
    assert capfd.readouterr().err == ""


# similarity


def test_similarity_gives_every_pair_and_what_is_chance(call, model, saved):
    values = call("similarity", saved, "--json")
    sizes, kept = [shape.numel() for shape in model.mask_bank.shapes], model.mask_bank.count(per_layer=True).tolist()
    for (i, first), (j, second) in itertools.combinations(enumerate(ROUTES), 2):
        chance = expected_jaccard_of_layers([[row[i], row[j]] for row in kept], sizes)[0][0, 1]
        found = jaccard(model, first, second)
        expected = {"jaccard": found, "chance": chance, "corrected": (found - chance) / (1 - chance)}
        for name, value in expected.items():
            assert values[name][i][j] == values[name][j][i] == pytest.approx(value, rel=1e-9)
    assert values["routes"] == ROUTES and "weights" not in values
    text = call("similarity", saved)
    (of_dog, corrected_of_dog) = [line.split() for line in text.splitlines() if line.startswith("dog ")]
    assert of_dog == ["dog", *(f"{value:.2f}" for value in values["jaccard"][1])]
    assert corrected_of_dog == ["dog", *(fraction(value, 2) for value in values["corrected"][1])]


def test_similarity_in_each_weight(call, model, saved):
    values = call("similarity", saved, "--per-layer", "--json")
    names = model.mask_bank.weight_names
    assert [weight["name"] for weight in values["weights"]] == names
    assert values["weights"][2]["jaccard"][0][1] == pytest.approx(jaccard(model, "cat", "dog", 2), rel=1e-12)
    # The owl's ticket keeps nothing there: its similarity to the others is 0, and to itself undefined.
    assert values["weights"][EMPTY]["jaccard"][2] == [0, 0, None]
    text = call("similarity", saved, "--per-layer")
    (line,) = [line for line in text.splitlines() if line.startswith(f"{names[2]} ")]
    pairs = [jaccard(model, first, second, 2) for first, second in itertools.combinations(ROUTES, 2)]
    assert line.split()[1] == f"{sum(pairs) / 3:.3f}"


@pytest.mark.parametrize("per_layer", [False, True])
def test_similarity_as_csv_and_as_a_picture(call, model, saved, tmp_path, per_layer):
    flags = ["--per-layer"] if per_layer else []
    values = call("similarity", saved, "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png", "--json", *flags)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    weights = values["weights"] if per_layer else [values]
    expected = [
        {
            **({"weight": weight["name"]} if per_layer else {}),
            "route": ROUTES[i],
            "other": ROUTES[j],
            **{name: str(weight[name][i][j]) for name in ("jaccard", "chance", "corrected")},
        }
        for weight in weights
        for i, j in itertools.combinations(range(3), 2)
    ]
    assert rows == expected
    assert imread(tmp_path / "a.png").shape[0] > 300
    assert len(list(tmp_path.iterdir())) == 2


def test_a_picture_needs_matplotlib_and_the_name_of_a_png(fails, saved, tmp_path, monkeypatch):
    assert "PNG files" in fails("similarity", saved, "--plot", tmp_path / "a.pdf")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert fails("similarity", saved, "--plot", tmp_path / "a.png").endswith("pip install hf_rtl[plots]")


def test_one_ticket_is_like_nothing(call, tmp_path):
    make_model(["all"], ticket_task="labels", num_labels=2).save_pretrained(tmp_path / "model")
    assert "nothing to compare it with" in call("inspect", tmp_path / "model")
    assert call("similarity", tmp_path / "model", "--json")["jaccard"] == [[1.0]]
