"""The commands of `hf-rtl` that write: export, card, push and tickets, on small saved models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig

from hf_rtl import ByCentres, ByColumn, ByGroups, RTLModel, RTLModelForImageClassification, load_rule, save_rule
from hf_rtl_cli.main import main
from tests.training.small_runs import SMALL_NET


ROUTES = ["cat", "dog", "owl"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> RTLModelForImageClassification:
    model = RTLModelForImageClassification.from_backbone(
        SMALL_NET, route_names=ROUTES, ticket_task="membership", seed=0
    )
    generator = torch.Generator().manual_seed(0)
    for route in range(3):
        model.mask_bank[route] = [torch.rand(shape, generator=generator) < 0.3 for shape in model.mask_bank.shapes]
    return model.eval()


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}\n')
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def call(capsys):
    """`call("card", folder)` returns the output, or with `--json` its values."""

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed

    return call


@pytest.fixture
def fails(capsys, tmp_path):
    """`fails("card", folder)` returns the error, one line, and checks that nothing in `tmp_path` has changed."""

    def fails(*arguments):
        before = content(tmp_path)
        assert main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and content(tmp_path) == before
        error = [line for line in printed.err.splitlines() if ": error: " in line]
        assert len(error) == 1 and "Traceback" not in printed.err
        return error[0]

    return fails


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@torch.no_grad()
def logits(model, **arguments):
    return model(pixel_values=IMAGES, **arguments).logits


# export


def test_an_exported_folder_is_a_plain_model(call, model, folder, tmp_path):
    values = call("export", folder, "--route", "dog", tmp_path / "dog", "--json")
    assert values["route"] == "dog" and set(values["files"]) == {file.name for file in (tmp_path / "dog").iterdir()}
    ticket = AutoModelForImageClassification.from_pretrained(tmp_path / "dog")
    assert type(ticket).__module__.startswith("transformers.")
    assert torch.equal(logits(ticket), logits(model, route_ids="dog"))
    assert ticket.config.id2label == {0: "dog"}
    assert (tmp_path / "dog" / "preprocessor_config.json").read_text() == '{"do_resize": false}\n'
    assert "dog" in call("export", folder, "--route", "dog", tmp_path / "dog", "--force")


@pytest.mark.slow
def test_an_exported_graph_gives_the_same(call, model, folder, tmp_path):
    call(
        "export",
        folder,
        "--route",
        "owl",
        tmp_path / "owl",
        "--format",
        "torch-export",
        "--prune-structure",
        "--input",
        "pixel_values=2x3x32x32",
    )
    graph = torch.export.load(tmp_path / "owl" / "model.pt2").module()
    assert torch.allclose(graph(pixel_values=IMAGES)["logits"], logits(model, route_ids="owl"), atol=1e-5)


@pytest.mark.slow
def test_a_graph_takes_inputs_of_the_models_type(call, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    model = RTLModelForImageClassification.from_backbone(config, route_names=["a", "b"], ticket_task="labels", seed=0)
    model.to(torch.bfloat16).eval().save_pretrained(tmp_path / "model")
    shape = "pixel_values=2x3x32x32"
    call("export", tmp_path / "model", "--route", "a", tmp_path / "a", "--format", "torch-export", "--input", shape)
    graph = torch.export.load(tmp_path / "a" / "model.pt2").module()
    images = IMAGES.bfloat16()
    expected = model(images, route_ids="a").logits
    assert torch.allclose(graph(pixel_values=images)["logits"], expected, atol=1e-2)


@pytest.mark.slow
def test_a_graph_takes_the_images_of_the_saved_processor(call, model, folder, tmp_path):
    crop = {"do_center_crop": True, "crop_size": {"height": 24, "width": 40}, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(crop))
    printed = call("export", folder, "--route", "owl", tmp_path / "owl", "--format", "torch-export")
    assert printed.splitlines()[-1] == "Its graph takes pixel_values [any, 3, 24, 40]."
    images = torch.ones(3, 3, 24, 40)
    graph = torch.export.load(tmp_path / "owl" / "model.pt2").module()
    assert torch.allclose(graph(pixel_values=images)["logits"], model(images, route_ids="owl").logits, atol=1e-5)
    shape = "pixel_values=2x3x32x32"
    arguments = ("export", folder, "--route", "owl", tmp_path / "given", "--format", "torch-export", "--input", shape)
    assert call(*arguments, "--json")["inputs"] == {"pixel_values": [None, 3, 32, 32]}


def test_what_export_refuses(fails, folder, tmp_path):
    assert "unknown route 'cow'; the routes are 'cat', 'dog', 'owl'" in fails(
        "export", folder, "--route", "cow", tmp_path / "cow"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty; --force" in fails("export", folder, "--route", "dog", tmp_path / "full")
    assert "the folder of the model itself" in fails("export", folder, "--route", "dog", folder, "--force")
    arguments = ("export", folder, "--route", "dog", tmp_path / "dog", "--prune-structure")
    assert "--format torch-export or --format onnx" in fails(*arguments)


# card


@pytest.mark.slow
def test_a_card_is_written_and_brought_up_to_date(call, folder, tmp_path):
    assert call("card", folder, "--json") == {"file": str(folder / "README.md")}
    file = folder / "README.md"
    card = ModelCard.load(file)
    assert card.data.pipeline_tag == "image-classification" and all(route in card.text for route in ROUTES)
    file.write_text(file.read_text() + "\nMine.\n")
    written = file.read_text()
    call("card", folder)
    assert file.read_text() == written
    assert call("card", folder, "--out", tmp_path / "page").strip() == str(tmp_path / "page" / "README.md")
    assert ModelCard.load(tmp_path / "page" / "README.md").data.pipeline_tag == "image-classification"


def test_a_card_needs_a_model(fails, tmp_path):
    assert "holds no saved model" in fails("card", tmp_path)
    assert "there is no folder" in fails("card", tmp_path / "nothing")


# tickets


@pytest.mark.slow
def test_tickets_are_listed_saved_dropped_and_added(call, model, folder, tmp_path):
    listed = call("tickets", "list", folder, "--json")
    assert [ticket["name"] for ticket in listed["tickets"]] == ROUTES and listed["kind"] == "model"
    assert [ticket["kept"] for ticket in listed["tickets"]] == model.mask_bank.count().tolist()
    saved = call("tickets", "save", folder, tmp_path / "tickets", "--route", "dog", "owl", "--json")
    assert saved["tickets"] == ["dog", "owl"]
    listed = call("tickets", "list", tmp_path / "tickets", "--json")
    assert [ticket["name"] for ticket in listed["tickets"]] == ["dog", "owl"] and listed["kind"] == "tickets"
    assert "dog" in call("tickets", "list", tmp_path / "tickets")
    dropped = call("tickets", "drop", folder, "--route", "dog", "--json")
    assert dropped["routes"] == ["cat", "owl"] == RTLModel.from_pretrained(folder).route_names
    added = call("tickets", "add", folder, tmp_path / "tickets", "--route", "dog", "--rename", "dog=wolf", "--json")
    assert (added["tickets"], added["routes"]) == (["wolf"], ["cat", "owl", "wolf"])
    assert torch.equal(logits(RTLModel.from_pretrained(folder), route_ids="wolf"), logits(model, route_ids="dog"))
    assert (folder / "preprocessor_config.json").is_file()


def test_a_rule_goes_along_as_long_as_it_has_the_routes(call, folder, tmp_path, caplog):
    rule = ByCentres(torch.eye(3, dtype=torch.float64), ROUTES)
    save_rule(folder, rule)
    tickets = call("tickets", "save", folder, tmp_path / "tickets", "--route", "owl", "--json")["tickets"]
    copy = tmp_path / "copy"
    call("tickets", "add", folder, tmp_path / "tickets", "--rename", "owl=eagle", "--out", copy)
    assert tickets == ["owl"] and not list(copy.glob("partition.*"))
    assert f"the rule of the partition is left out: {copy / 'partition.json'} is a rule for other" in caplog.text
    assert "'owl', than those of the model" in caplog.text
    assert load_rule(folder).to_dict() == rule.to_dict()
    call("tickets", "drop", copy, "--route", "eagle", "--out", tmp_path / "again")
    assert not list((tmp_path / "again").glob("partition.*"))

    assert len(list(folder.glob("partition.*"))) == 2
    call("tickets", "drop", folder, "--route", "owl")
    assert f"{folder / 'partition.json'}, stays for when 'owl' are added again" in caplog.text
    assert call("inspect", folder, "--json")["rule"] is None
    call("tickets", "add", folder, tmp_path / "tickets")
    assert load_rule(folder).to_dict() == rule.to_dict()


@pytest.mark.parametrize(
    "rule",
    [
        ByColumn("kind", ROUTES),
        ByGroups("kind", {"cat": ["lion", "puma"], "dog": ["pug"], "owl": ["owl"]}),
        ByCentres(torch.eye(3, dtype=torch.float64), ROUTES),
    ],
)
def test_a_dropped_ticket_comes_back_with_the_rule(call, folder, tmp_path, rule):
    save_rule(folder, rule)
    data = torch.eye(3, dtype=torch.float64)
    if not isinstance(rule, ByCentres):
        data = [{"kind": kind} for kind in (ROUTES if isinstance(rule, ByColumn) else ["puma", "pug", "owl"])]
    before = rule.assign(data)
    call("tickets", "save", folder, tmp_path / "tickets", "--route", "cat")
    fewer, again = tmp_path / "fewer", tmp_path / "again"
    call("tickets", "drop", folder, "--route", "cat", "--out", fewer)
    with pytest.raises(ValueError, match="is a rule for other routes"):
        load_rule(fewer)
    call("tickets", "add", fewer, tmp_path / "tickets", "--out", again)
    after = load_rule(again).assign(data)
    assert after.route_names == ["dog", "owl", "cat"]
    names = [[part.route_names[route] for route in part.route_ids] for part in (before, after)]
    assert names[0] == names[1]


def test_a_changed_model_can_go_elsewhere_and_stays_compact(call, model, folder, tmp_path):
    model.save_pretrained(folder, compact=True)
    before = content(folder)
    call("tickets", "drop", folder, "--route", "cat", "--out", tmp_path / "fewer")
    assert content(folder) == before
    assert (tmp_path / "fewer" / "preprocessor_config.json").is_file()
    assert any(name.startswith("compact.") for name in load_file(tmp_path / "fewer" / "model.safetensors"))
    fewer = RTLModel.from_pretrained(tmp_path / "fewer")
    assert fewer.route_names == ["dog", "owl"]
    assert torch.equal(logits(fewer, route_ids="owl"), logits(model, route_ids="owl"))


@pytest.mark.slow
def test_what_tickets_refuse(call, fails, folder, tmp_path):
    call("tickets", "save", folder, tmp_path / "tickets")
    assert "has a route 'cat' already" in fails("tickets", "add", folder, tmp_path / "tickets")
    assert "unknown route 'cow'; the routes are" in fails("tickets", "drop", folder, "--route", "cow")
    assert "needs at least two routes" in fails("tickets", "drop", folder, "--route", "cat", "dog")
    assert "is not empty" in fails("tickets", "save", folder, tmp_path / "tickets")
    assert "holds no tickets" in fails("tickets", "add", folder, folder)
    (tmp_path / "empty").mkdir()
    assert "tickets" in fails("tickets", "list", tmp_path / "empty")
    index = json.loads((tmp_path / "tickets" / "tickets.json").read_text())
    del index["tickets"][0]["kept"]
    (tmp_path / "tickets" / "tickets.json").write_text(json.dumps(index))
    assert "tickets.json of" in fails("tickets", "list", tmp_path / "tickets")
    assert "is a file: give the folder" in fails("tickets", "list", folder / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_changed_model_keeps_its_code(call, folder, tmp_path, elsewhere):
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=ROUTES, ticket_task="membership", seed=0
    )  # code goes along with stock backbones only
    model.save_pretrained(folder, with_code=True)
    code = {file.name for file in folder.glob("*.py")}
    call("tickets", "save", folder, tmp_path / "tickets", "--route", "cat")
    target = tmp_path / "fewer" if elsewhere else folder
    out = ["--out", target] if elsewhere else []
    call("tickets", "drop", folder, "--route", "cat", *out)
    again = tmp_path / "again" if elsewhere else folder
    call("tickets", "add", target, tmp_path / "tickets", *(["--out", again] if elsewhere else []))
    for changed in (target, again):
        assert code and {file.name for file in changed.glob("*.py")} == code
        auto_map = json.loads((changed / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_rtl.RTLConfig"


def test_a_torn_file_of_weights_is_one_line(fails, folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) // 2, 4, 0):
        file.unlink()
        file.write_bytes(whole[:length])
        assert "is cut short or damaged" in fails("inspect", folder)


# push


def test_what_push_refuses_before_anything_is_sent(fails, folder, tmp_path):
    """Sockets are blocked here."""
    assert "there is no folder" in fails("push", tmp_path / "nothing", "org/name")
    (tmp_path / "empty").mkdir()
    assert "holds no saved model" in fails("push", tmp_path / "empty", "org/name")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mask_fingerprint": "0" * 64}))
    assert "the masks have the fingerprint" in fails("push", folder, "org/name")
