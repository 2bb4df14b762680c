"""Files of tickets without whole units: a bit per unit, no zeros of a refit, and the same tickets to the bit."""

import json
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rtl import (
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForSequenceClassification,
)
from hf_rtl.modeling import configuration_rtl, modeling_rtl, ticket_files
from hf_rtl.modeling.files import read_tensors, write_tensors
from hf_rtl.modeling.mask_coding import encode
from tests.modeling.small_backbones import build, units_found_once
from tests.modeling.test_ticket_files import assert_unchanged, copy_state, damaged_index


ROUTES = ["ant", "bee", "cat"]
CLASSES = {
    "bert": RTLModelForSequenceClassification,
    "gpt2": RTLModelForCausalLM,
    "llama": RTLModelForCausalLM,
    "phi3": RTLModelForCausalLM,
    "bottlenecks": RTLModelForImageClassification,
}
REFITTED = ["bert", "gpt2", "llama", "phi3"]
CASES = [(kind, refit) for kind in CLASSES for refit in (False, True) if not refit or kind in REFITTED]
INDEX = "tickets.json"
MASKS = {"compact.union", "compact.masks"}


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


def make_model(kind, *, refit=False):
    """A model whose tickets lack random units, its inputs, and the number of its units."""
    network, inputs = build(kind)
    routes = {"route_names": ROUTES, "ticket_task": "labels"}
    task_class = CLASSES.get(kind, RTLModelForImageClassification)
    model = task_class.from_backbone(network, **routes)
    layers = [
        layer
        for layer in model.unit_layers(inputs)
        if all(reader in model.mask_bank.weight_names for reader, _ in layer.readers)
    ]
    if refit:
        readers = [name for layer in layers for name, _ in layer.readers]
        model = CLASSES.get(kind, RTLModelForImageClassification).from_backbone(
            network, private_parameters=readers, prune_exclude=readers, **routes
        )
    generator = torch.Generator().manual_seed(0)
    for route in range(len(ROUTES)):
        masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[route], strict=True))
        rows = dict(zip(model.private_parameters.names, model.private_parameters.rows, strict=True))
        for layer in layers:
            removed = torch.randperm(layer.num_units, generator=generator)[: layer.num_units // 2]
            for (name, dim), units in layer.places.items():
                if name in masks:
                    masks[name].index_fill_(dim, units[removed].flatten(), False)
                if name in rows:
                    with torch.no_grad():
                        rows[name][route].mul_(1.5).index_fill_(dim, units[removed].flatten(), 0)
        model.mask_bank[route] = list(masks.values())
    if model.norm_statistics is not None:
        for rows in model.norm_statistics.rows:
            rows.copy_((rows + torch.rand(rows.shape, generator=generator)).to(rows.dtype))
    return model.eval(), inputs, sum(layer.num_units for layer in layers)


@torch.no_grad()
def outputs(model, inputs, route):
    return model(**inputs, route_ids=route).logits


def assert_same_tickets(model, other, inputs, routes=ROUTES):
    for route in routes:
        assert torch.equal(outputs(model, inputs, route), outputs(other, inputs, route))
        masks = zip(model.mask_bank[route], other.mask_bank[route], strict=True)
        assert all(torch.equal(mask, found) for mask, found in masks)
        private = zip(
            model.private_parameters.row(model.mask_bank.route_index(route)),
            other.private_parameters.row(other.mask_bank.route_index(route)),
            strict=True,
        )
        assert all(torch.equal(bits(row), bits(found)) for row, found in private)


def bits(tensor):
    return tensor.detach().view(torch.int32)


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bytes_in(folder):
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def unpacked(coding, coded):
    return coded.numpy().tobytes() if coding == "units-raw" else zlib.decompress(coded.numpy().tobytes(), wbits=-15)


def num_dims(model, key="mask"):
    private = [rows[0].shape for rows in model.private_parameters.rows]
    return sum(map(len, private if "private" in key else model.mask_bank.shapes))


def bits_of_vectors(kind, num_units, refit):
    """A bit per unit; a fused projection has one for each half of its rows, and a reader that is not fused another."""
    return {"phi3": 2 * num_units if refit else 3 * num_units}.get(kind, num_units)


# Round trips, sizes and versions


@pytest.mark.parametrize(("kind", "refit"), CASES)
def test_tickets_in_files_take_a_bit_per_unit_and_come_back(kind, refit, tmp_path):
    model, inputs, num_units = make_model(kind, refit=refit)
    index = model.save_tickets(tmp_path)
    assert index["format_version"] == 2
    bank = model.mask_bank
    for route, entry in enumerate(index["tickets"]):
        tensors = load_file(tmp_path / entry["file"])
        coding = entry["coding"]["mask"]
        num_bits = bits_of_vectors(kind, num_units, refit)
        header = 4 * num_dims(model)
        assert len(unpacked(coding, tensors["mask"])) == header + -(-num_bits // 8)
        assert len(tensors["mask"]) < header + -(-num_bits // 8)
        assert len(tensors["mask"]) < len(encode(torch.cat([rows[route] for rows in bank.packed]))[1])
        assert ("private_kept" in tensors) == ("private_kept" in entry["coding"]) == refit
        if refit:
            header = 4 * num_dims(model, "private")
            content = unpacked(entry["coding"]["private_kept"], tensors["private_kept"])
            assert len(content) == header + -(-num_units // 8)
            whole = sum(row.numel() for row in model.private_parameters.row(route))
            assert tensors["private"].shape == (whole // 2,)
    assert bytes_in(tmp_path) == model.footprint()["tickets_bytes"]

    user, _, _ = make_model(kind, refit=refit)
    for route in ROUTES[1:]:
        user.drop_route(route)
    assert user.load_tickets(tmp_path, ["cat", "bee"]) == ["cat", "bee"]
    assert_same_tickets(model, user, inputs)


@pytest.mark.parametrize(("kind", "refit"), CASES)
def test_a_compact_file_takes_a_bit_per_unit_and_route_and_comes_back(kind, refit, tmp_path):
    model, inputs, num_units = make_model(kind, refit=refit)
    model.save_pretrained(tmp_path / "compact", compact=True)
    model.save_pretrained(tmp_path / "full")
    config, tensors = config_of(tmp_path / "compact"), tensors_in(tmp_path / "compact")
    assert config["format_version"] == 2 and set(config["compact"].values()) <= {"units-raw", "units-deflate"}
    assert config["compact"].keys() == ({"compact.units", "compact.private"} if refit else {"compact.units"})
    assert not any(name.startswith("mask_bank") for name in tensors) and not MASKS & tensors.keys()
    num_bits = 3 * bits_of_vectors(kind, num_units, refit)
    content = unpacked(config["compact"]["compact.units"], tensors["compact.units"])
    assert len(content) == 3 * 4 * num_dims(model) + -(-num_bits // 8)
    assert ("compact.p0000" in tensors) is refit and "private_parameters.p0000" not in tensors
    footprint = model.footprint()
    assert bytes_in(tmp_path / "compact") == footprint["compact_bytes"]
    assert len(tensors["compact.units"]) == footprint["coded_mask_bytes"]
    assert bytes_in(tmp_path / "full") == footprint["full_bytes"]
    # In full nothing is coded: the version is that of all earlier files.
    assert config_of(tmp_path / "full")["format_version"] == 1

    loaded = RTLModel.from_pretrained(tmp_path / "compact")
    assert loaded.config.compact is None
    assert_same_tickets(model, loaded, inputs)
    if not refit:  # The mean of whole rows is another one.
        assert torch.equal(outputs(model, inputs, -1), outputs(loaded, inputs, -1))
    loaded.save_pretrained(tmp_path / "again", compact=True)
    again = tensors_in(tmp_path / "again")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)
    loaded.save_pretrained(tmp_path / "full again")
    assert config_of(tmp_path / "full again")["format_version"] == 1


@pytest.mark.parametrize("refit", [False, True])
def test_earlier_versions_refuse_such_files(refit, tmp_path, monkeypatch):
    model, _, _ = make_model("gpt2", refit=refit)
    model.save_tickets(tmp_path / "tickets")
    model.save_pretrained(tmp_path / "compact", compact=True)
    monkeypatch.setattr(configuration_rtl, "FORMAT_VERSION", 1)
    monkeypatch.setattr(ticket_files, "TICKETS_FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="in format 2; this is hf_rtl .*, which reads formats up to 1. Update hf_rtl"):
        RTLModel.from_pretrained(tmp_path / "compact")
    with pytest.raises(ValueError, match="in format 2; this is hf_rtl .*, which reads formats up to 1. Update hf_rtl"):
        model.load_tickets(tmp_path / "tickets", rename="auto")


def test_a_single_weight_that_does_not_fit_leaves_masks_as_earlier_versions_write_them(tmp_path):
    model, inputs, _ = make_model("gpt2")
    masks = model.mask_bank["bee"]
    masks[0][3, 5] ^= True
    model.mask_bank["bee"] = masks
    index = model.save_tickets(tmp_path / "all")
    assert index["format_version"] == 2 and index["tickets"][0]["coding"]["mask"].startswith("units")
    index = model.save_tickets(tmp_path / "bee", ["bee"])
    coding, coded = encode(torch.cat([rows[1] for rows in model.mask_bank.packed]))
    assert index["format_version"] == 1 and index["tickets"][0]["coding"] == {"mask": coding}
    write_tensors(tmp_path / "expected.safetensors", {"mask": coded})
    assert (tmp_path / "bee" / "ticket-000.safetensors").read_bytes() == (
        tmp_path / "expected.safetensors"
    ).read_bytes()

    model.save_pretrained(tmp_path / "compact", compact=True)
    config, tensors = config_of(tmp_path / "compact"), tensors_in(tmp_path / "compact")
    assert config["format_version"] == 1 and config["compact"].keys() == MASKS
    assert torch.equal(tensors["compact.union"], encode(torch.cat(model.mask_bank.packed_union()))[1])
    assert bytes_in(tmp_path / "compact") == model.footprint()["compact_bytes"]
    for user in (RTLModel.from_pretrained(tmp_path / "compact"), make_model("gpt2")[0]):
        for route in ROUTES[1:]:
            user.drop_route(route)
        user.load_tickets(tmp_path / "all", ROUTES[1:])
        assert_same_tickets(model, user, inputs)


@pytest.mark.parametrize("value", [1.0, -0.0])
def test_rows_without_zeros_for_units_are_saved_whole(value, tmp_path):
    """A zero with a sign is another value."""
    model, inputs, _ = make_model("gpt2", refit=True)
    with torch.no_grad():
        for rows in model.private_parameters.rows:
            rows.copy_(torch.where(rows == 0, value, rows))
    index = model.save_tickets(tmp_path / "tickets")
    assert all(entry["coding"].keys() == {"mask"} for entry in index["tickets"])
    model.save_pretrained(tmp_path / "compact", compact=True)
    assert config_of(tmp_path / "compact")["compact"].keys() == {"compact.units"}
    footprint = model.footprint()
    assert bytes_in(tmp_path / "compact") == footprint["compact_bytes"]
    assert bytes_in(tmp_path / "tickets") == footprint["tickets_bytes"]
    loaded = RTLModel.from_pretrained(tmp_path / "compact")
    assert_same_tickets(model, loaded, inputs)
    loaded.load_tickets(tmp_path / "tickets", rename={name: f"{name} 2" for name in ROUTES})
    for own, again in zip(loaded.private_parameters.row(0), loaded.private_parameters.row(3), strict=True):
        assert torch.equal(bits(own), bits(again))


def test_rows_of_zeros_take_nothing(tmp_path):
    model, inputs, _ = make_model("gpt2", refit=True)
    with torch.no_grad():
        model.private_parameters.rows[0].zero_()
    model.save_pretrained(tmp_path / "compact", compact=True)
    assert "compact.p0000" not in tensors_in(tmp_path / "compact")
    assert_same_tickets(model, RTLModel.from_pretrained(tmp_path / "compact"), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_come_back_in_other_types(dtype, tmp_path):
    model, _, _ = make_model("gpt2", refit=True)
    model.to(dtype).save_pretrained(tmp_path / "compact", compact=True)
    loaded = RTLModel.from_pretrained(tmp_path / "compact")
    for rows, again in zip(model.private_parameters.rows, loaded.private_parameters.rows, strict=True):
        assert again.dtype == dtype and torch.equal(rows, again)


def test_a_ticket_of_units_brings_weights_that_its_base_lacks(tmp_path):
    model, inputs, _ = make_model("llama")
    index = model.save_tickets(tmp_path / "tickets", ["bee"], base_routes=["ant"])
    (entry,) = index["tickets"]
    assert (
        entry["added"] > 0 and entry["coding"]["mask"].startswith("units") and "units" not in entry["coding"]["added"]
    )
    for route in ROUTES[1:]:
        model.drop_route(route)
    model.save_pretrained(tmp_path / "base", compact=True)
    user, whole = RTLModel.from_pretrained(tmp_path / "base"), make_model("llama")[0]
    user.load_tickets(tmp_path / "tickets")
    assert_same_tickets(whole, user, inputs, ["ant", "bee"])
    # A ticket of single weights beside it is saved as ever, and what was there keeps its coding.
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in user.mask_bank.shapes]
    user.append_ticket("dog", masks, statistics=(), brings_weights=True)
    user.save_tickets(tmp_path / "both", ["bee", "dog"])
    codings = [entry["coding"]["mask"] for entry in ticket_files.read_index(tmp_path / "both")["tickets"]]
    assert [coding.startswith("units") for coding in codings] == [True, False]
    user.save_pretrained(tmp_path / "user", compact=True)
    assert config_of(tmp_path / "user")["format_version"] == 1
    assert_same_tickets(user, RTLModel.from_pretrained(tmp_path / "user"), inputs, ["ant", "bee", "dog"])


# Damaged files, which change nothing


def numbered(content, num_numbers, new, *, place=-1, of_vector=False):
    """Units, not deflated, with another number of a dimension; of those that are full, or that have a vector."""
    numbers = np.frombuffer(content[: 4 * num_numbers], "<i4").copy()
    numbers[np.flatnonzero((numbers > 0) == of_vector)[place]] = new
    return raw(numbers.tobytes() + content[4 * num_numbers :])


def raw(content):
    return torch.tensor(list(content), dtype=torch.uint8)


def bomb():
    deflater = zlib.compressobj(wbits=-15)
    return raw(deflater.compress(bytes(2**26)) + deflater.flush())


# What is wrong with the coded bytes of units -> these, made of the right ones, and the error.
WRONG_UNITS = {
    "cut in the vectors": (lambda content, _: raw(content[:-1]), "bytes or more of vectors, expected .* bits"),
    "cut in the numbers": (lambda content, _: raw(content[:5]), "it has 5 bytes, expected .* or more"),
    "nothing": (lambda content, _: raw(b""), "it has 0 bytes, expected .* or more"),
    "too long": (lambda content, _: raw(content + b"\0"), "bytes or more of vectors, expected .* bits"),
    "a negative number": (lambda *units: numbered(*units, -1), "it has a vector -1 for a dimension"),
    "a far number": (lambda *units: numbered(*units, 99), "it has a vector 99 for a dimension"),
    "a vector of another length": (lambda *units: numbered(*units, 1), "it has a vector 1 for a dimension of"),
    "a vector too few": (lambda *units: numbered(*units, 0, place=0, of_vector=True), "damaged"),
    "floats": (lambda content, _: raw(content).float(), r"must be torch.uint8 \[num_bytes\], got torch.float32"),
    "two dimensions": (lambda content, _: raw(content)[None], r"torch.uint8 \[num_bytes\], got torch.uint8 \(1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    """A folder with a refitted model's tickets, and with it in compact form."""
    folder = tmp_path_factory.mktemp("refitted")
    model, _, _ = make_model("gpt2", refit=True)
    model.save_tickets(folder / "tickets", ["bee"])
    model.save_pretrained(folder / "compact", compact=True)
    return folder


def copied(folder, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def damage_ticket(folder, change, **codings):
    """Changes the tensors of a ticket; the file has the hash of its content all the same."""
    file = folder / "ticket-000.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors)
    damaged_index(folder, lambda index: index["tickets"][0]["coding"].update(codings))


def damage_compact(folder, change, **codings):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(folder)
    config["compact"] |= {f"compact.{name}": coding for name, coding in codings.items()}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["mask", "private_kept"])
def test_damaged_units_of_a_ticket_are_refused(key, refitted, tmp_path):
    user, _, _ = make_model("gpt2", refit=True)
    user.drop_route("bee")
    before = copy_state(user)
    for damage, message in WRONG_UNITS.values():
        folder = copied(refitted / "tickets", tmp_path)
        coding = json.loads((folder / INDEX).read_text())["tickets"][0]["coding"][key]
        content = unpacked(coding, load_file(folder / "ticket-000.safetensors")[key])
        wrong = damage(content, num_dims(user, key))
        damage_ticket(folder, partial(dict.update, **{key: wrong}), **{key: "units-raw"})
        with pytest.raises(ValueError, match=message):
            user.load_tickets(folder)
    for change, codings, message in (
        (lambda tensors: tensors.update({key: bomb()}), {key: "units-deflate"}, "damaged"),
        (lambda tensors: tensors.update({key: raw(b"abc")}), {key: "units-deflate"}, "damaged"),
        (lambda tensors: None, {key: "units-pickle"}, "must be one of .*'units-raw', 'units-deflate', got"),
        (lambda tensors: None, {key: ["units-raw"]}, "must be one of .*'units-raw', 'units-deflate', got"),
        (lambda tensors: None, {key: None}, "must be one of .*'units-raw', 'units-deflate', got None"),
        (lambda tensors: None, {key: "deflate" if key == "mask" else "raw"}, "damaged|must be one of 'units-raw'"),
        (lambda tensors: tensors.pop(key), {}, "tickets.json of .* is damaged"),
        (lambda tensors: tensors.update(private=tensors["private"][:-1]), {}, "it leaves .* values of private param"),
        (lambda tensors: tensors.update(private=tensors["private"][None]), {}, "it leaves .* values of private param"),
        (lambda tensors: tensors.pop("private"), {}, "it leaves .* values of private parameters"),
        (lambda tensors: None, {"added": "units-raw"}, None),  # there is nothing added, so nobody reads it
    ):
        folder = copied(refitted / "tickets", tmp_path)
        damage_ticket(folder, change, **codings)
        if message is not None:
            with pytest.raises(ValueError, match=message):
                user.load_tickets(folder)
    assert_unchanged(user, before)
    assert user.load_tickets(folder) == ["bee"]


def test_an_index_without_the_coding_of_rows_is_refused(refitted, tmp_path):
    folder = copied(refitted / "tickets", tmp_path)
    damaged_index(folder, lambda index: index["tickets"][0]["coding"].pop("private_kept"))
    user, _, _ = make_model("gpt2", refit=True)
    with pytest.raises(ValueError, match="ticket-000.safetensors of .* is damaged"):
        user.load_tickets(folder, rename="auto")
    damaged_index(folder, lambda index: index.update(private_parameters=[]))
    damaged_index(folder, lambda index: index["tickets"][0]["coding"].update(private_kept="units-raw"))
    with pytest.raises(ValueError, match="damaged"):
        user.load_tickets(folder, rename="auto")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["units", "private"])
def test_damaged_units_of_a_compact_file_are_refused(key, refitted, tmp_path):
    name, model = f"compact.{key}", make_model("gpt2", refit=True)[0]
    for damage, message in WRONG_UNITS.values():
        folder = copied(refitted / "compact", tmp_path)
        content = unpacked(config_of(folder)["compact"][name], tensors_in(folder)[name])
        wrong = {name: damage(content, 3 * num_dims(model, key))}
        damage_compact(folder, partial(dict.update, **wrong), **{key: "units-raw"})
        with pytest.raises(ValueError, match=message):
            RTLModel.from_pretrained(folder)
    for change, codings, message in (
        (lambda tensors: tensors.update({name: bomb()}), {key: "units-deflate"}, "damaged"),
        (lambda tensors: None, {key: "raw"}, "must be one of 'units-raw', 'units-deflate', got 'raw'"),
        (lambda tensors: None, {key: {}}, "must be one of 'units-raw', 'units-deflate', got {}"),
        (lambda tensors: None, {"union": "raw"}, r"lacks 1 tensor\(s\) of masks \(compact.union\)"),
        (
            lambda tensors: tensors.update({"compact.union": raw(b"")}),
            {"union": "raw"},
            "lacks 0 tensor.* codings; it",
        ),
        (lambda tensors: tensors.pop(name), {}, rf"lacks 1 tensor\(s\) of masks \({name}\)"),
        (
            lambda tensors: tensors.pop("compact.p0001"),
            {},
            r"has \(0,\) weights of private_parameters.p0001, of which",
        ),
        (
            lambda tensors: tensors.update({"compact.p0001": torch.ones(2, 3)}),
            {},
            r"has \(2, 3\) weights of private_p",
        ),
    ):
        folder = copied(refitted / "compact", tmp_path)
        damage_compact(folder, change, **codings)
        with pytest.raises(ValueError, match=message):
            RTLModel.from_pretrained(folder)


def test_another_unit_in_the_masks_is_seen(refitted, tmp_path):
    folder = copied(refitted / "compact", tmp_path)
    content = bytearray(unpacked(config_of(folder)["compact"]["compact.units"], tensors_in(folder)["compact.units"]))
    kept = content[-1] & -content[-1]
    gone = ~content[-1] & (content[-1] + 1) & 0xFF
    content[-1] ^= kept | gone  # as many units are kept
    damage_compact(folder, lambda tensors: tensors.update({"compact.units": raw(content)}), units="units-raw")
    with pytest.raises(ValueError, match="of which the tickets keep|the masks have the fingerprint"):
        RTLModel.from_pretrained(folder)
