"""Saving, loading and taking apart routed models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from hf_rtl import (
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSemanticSegmentation,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
)
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.prunable import parameter_aliases
from tests.modeling.bits import assert_bit_equal, tensors


ROUTES = {"route_names": ["x", "y"], "ticket_task": "labels"}
KINDS = ("timm", "vit", "bert", "t5")


@pytest.fixture
def build(request, fill_masks):
    """`build(kind)` returns a model with random masks and statistics, and inputs without labels."""

    def make(kind, dtype=torch.float32):
        ids = torch.randint(2, 40, (3, 6))
        if kind == "timm":
            cls, source, inputs = RTLModelForImageClassification, "test_resnet", {"pixel_values": (3, 3, 32, 32)}
        elif kind == "vit":
            cls, source, inputs = RTLModelForImageClassification, "tiny_vit_config", {"pixel_values": (3, 3, 8, 8)}
        elif kind == "bert":
            cls, source, inputs = RTLModelForMaskedLM, "tiny_bert_config", {"input_ids": ids}
        else:
            cls, source = RTLModelForSeq2SeqLM, "tiny_t5_config"
            inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
        include = {"bert": ["*word_embeddings.weight"], "t5": ["shared.weight"]}.get(kind, [])
        source = request.getfixturevalue(source) if source.endswith("config") else source
        labels = {"num_labels": 3} if kind == "timm" else {}
        model = cls.from_backbone(source, prune_include=include, seed=0, **labels, **ROUTES)
        fill_masks(model)
        for rows in model.norm_statistics.rows:
            rows.copy_(torch.rand(rows.shape) + 0.5 if rows.is_floating_point() else torch.arange(3))
        inputs = {n: torch.randn(v, dtype=dtype) if isinstance(v, tuple) else v for n, v in inputs.items()}
        model.to(dtype)
        if kind == "t5" and dtype == torch.float16:  # transformers keeps these in float32 when it loads a T5
            for name, module in model.backbone.named_modules():
                if name.endswith(".wo"):
                    module.float()
        return model.eval(), inputs

    return make


# Saving and loading


@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_bit_exact(build, tmp_path, kind, dtype, sharded):
    model, inputs = build(kind, dtype)
    shards = {"max_shard_size": "20KB" if kind == "timm" else "5KB"} if sharded else {}
    model.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded = RTLModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert_bit_equal(loaded, model)
    assert {rows.dtype for rows in loaded.mask_bank.packed} == {torch.uint8}
    assert {rows.dtype for rows in loaded.norm_statistics.rows} <= {torch.float32, torch.int64}
    shared = [name for name, places in parameter_aliases(loaded.backbone).items() if len(places) > 1]
    assert bool(shared) == (kind in ("bert", "t5"))
    for route in (0, 1, UNION):
        assert torch.equal(loaded(**inputs, route_ids=route).logits, model(**inputs, route_ids=route).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_masks_and_statistics(build, tmp_path, dtype):
    for kind in ("timm", "t5"):
        model, _ = build(kind)
        model.save_pretrained(tmp_path / kind)
        loaded = RTLModel.from_pretrained(tmp_path / kind, dtype=dtype)
        assert loaded.dtype == dtype
        for part in ("mask_bank", "norm_statistics"):
            assert_bit_equal(getattr(loaded, part), getattr(model, part))


@pytest.mark.slow
def test_auto_classes_open_what_was_saved(build, tmp_path):
    for kind, auto in (("timm", AutoModelForImageClassification), ("bert", AutoModelForMaskedLM)):
        model, _ = build(kind)
        model.save_pretrained(tmp_path / kind)
        for load in (auto, AutoModel, type(model)):
            loaded = load.from_pretrained(tmp_path / kind)
            assert type(loaded) is type(model)
        _, info = RTLModel.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def spoil(source, target, change=lambda state: None, **entries):
    """A copy of the folder `source` with changed tensors and entries of config.json."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **entries}))
    return target


MASK = "mask_bank.m0001"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(MASK), f"lacks 1 tensor.*{MASK}"),
        (lambda s: s.pop("norm_statistics.s0003"), "lacks 1 tensor.*norm_statistics.s0003"),
        (lambda s: s.pop("backbone.timm_model.fc.weight"), "lacks 1 tensor.*fc.weight"),
        (lambda s: s.update({MASK: s[MASK][:, :-1].clone()}), f"wrong sizes of 1 tensor.*{MASK}"),
        (lambda s: s.update({MASK: s[MASK][:1].clone()}), f"wrong sizes of 1 tensor.*{MASK}"),
        (lambda s: s.update({"mask_bank.m0099": s[MASK].clone()}), "has unknown 1 tensor.*m0099"),
        (lambda s: s.update({MASK: s[MASK] ^ 1}), "masks have the fingerprint"),
        (lambda s: s.update({MASK: s[MASK].flip(0).clone()}), "masks have the fingerprint"),
    ],
)
def test_damaged_checkpoints_are_refused(build, tmp_path, change, message):
    model, _ = build("timm")
    model.save_pretrained(tmp_path / "good")
    bad = spoil(tmp_path / "good", tmp_path / "bad", change)
    for arguments in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=message):
            RTLModel.from_pretrained(bad, **arguments)


def test_altered_configurations_are_refused(build, tmp_path):
    model, _ = build("timm")
    model.save_pretrained(tmp_path / "good")
    prunable = [[name, list(shape)] for name, shape in model.config.prunable]
    for index, (entries, message) in enumerate(
        [
            ({"mask_fingerprint": "0" * 64}, "masks have the fingerprint"),
            ({"route_names": ["x", "y", "z"]}, "wrong sizes"),
            ({"prunable": prunable[::-1]}, "wrong sizes"),
            ({"prunable": [["no.such.weight", [2, 2]], *prunable[1:]]}, "no such weight"),
            ({"norm_statistics": "shared"}, "has unknown"),
        ]
    ):
        bad = spoil(tmp_path / "good", tmp_path / f"bad{index}", **entries)
        with pytest.raises(ValueError, match=message):
            RTLModel.from_pretrained(bad)


def test_another_class_is_refused(build, tmp_path):
    """A causal and a masked language model of one architecture have the same tensors."""
    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    for cls in (RTLModelForCausalLM, RTLModelForTokenClassification, RTLModelForSequenceClassification):
        with pytest.raises(ValueError):
            cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved as RTLModelForMaskedLM, which RTLModelForCausalLM is not"):
        RTLModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError):
        RTLModelForSemanticSegmentation.from_pretrained(tmp_path)


def test_saving_leaves_no_weights_of_an_earlier_save(build, tmp_path):
    model, _ = build("vit")
    for arguments in ({"max_shard_size": "5KB"}, {}, {"max_shard_size": "10KB"}):
        model.mask_bank[0] = [~mask for mask in model.mask_bank[0]]
        (tmp_path / "notes.txt").write_text("mine")
        model.save_pretrained(tmp_path, **arguments)
        index = tmp_path / "model.safetensors.index.json"
        weights = {file.name for file in tmp_path.glob("*.safetensors")}
        assert index.exists() == bool(arguments)
        listed = set(json.loads(index.read_text())["weight_map"].values()) if arguments else {"model.safetensors"}
        assert weights == listed
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert_bit_equal(RTLModel.from_pretrained(tmp_path), model)


def test_an_interrupted_save_leaves_the_folder_whole(build, tmp_path, monkeypatch):
    model, _ = build("vit")
    target = tmp_path / "model"
    model.save_pretrained(target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    original = PreTrainedModel.save_pretrained

    def interrupted(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    model.mask_bank[0] = [~mask for mask in model.mask_bank[0]]
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]  # no temporary file is left beside it


def test_what_contradicts_the_configuration_is_not_saved(build, tmp_path):
    model, _ = build("vit")
    model.mask_bank.rename_route("x", "renamed")
    with pytest.raises(ValueError, match="the mask bank has the routes"):
        model.save_pretrained(tmp_path / "new")
    model.config.route_names = ["renamed", "y"]
    model.config.thresholds = [0.5]
    with pytest.raises(ValueError, match="`thresholds` has 1 values"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="view with a fixed route"):
        model.with_route(0).save_pretrained(tmp_path / "new")


# Tickets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_extracted_ticket_is_plain_and_bit_equal(build, tmp_path, kind, dtype):
    model, inputs = build(kind, dtype)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    for route in (0, "y", UNION):
        expected = model(**inputs, route_ids=route).logits
        ticket = model.extract_ticket(route)
        assert type(ticket) is type(model.backbone)
        assert torch.equal(ticket(**inputs).logits, expected)
        assert not any(type(module).__module__.startswith("hf_rtl") for module in ticket.modules())
        assert tensors(ticket).keys() == tensors(model.backbone).keys()
    ticket.save_pretrained(tmp_path)
    assert "rtl" not in (tmp_path / "config.json").read_text()
    auto = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(kind, AutoModelForImageClassification)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(ticket)
    assert_bit_equal(loaded, ticket)
    with torch.no_grad():
        for parameter in ticket.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_an_extracted_ticket_in_channels_last(build):
    """Weights that are not contiguous are masked as well."""
    model, inputs = build("timm")
    model.to(memory_format=torch.channels_last)
    ticket = model.extract_ticket(1)
    names = dict(ticket.named_parameters())
    for name, mask in zip(model.mask_bank.weight_names, model.mask_bank[1], strict=True):
        assert not names[name][~mask].any() and names[name][mask].any(), name
    assert torch.equal(ticket(**inputs).logits, model(**inputs, route_ids=1).logits)


def test_a_view_with_a_fixed_route(tiny_membership_model):
    model, x = tiny_membership_model.eval(), torch.randn(2, 3, 32, 32)
    view = model.with_route("dog")
    assert torch.equal(view(x).logits, model(x, route_ids=1).logits)
    assert view.config.id2label == {0: "dog"} and view.config.label2id == {"dog": 0}
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and model(x).logits.shape == (2, 3)
    assert model.with_route(UNION).config.id2label == {0: "union"}
    assert all(one is other for one, other in zip(view.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="view with the fixed route 'dog'"):
        view(x, route_ids=1)
    with pytest.raises(ValueError, match="unknown route 'cow'"):
        model.with_route("cow")
    # Another route that moves up does not replace the view's route.
    model.append_ticket("cow", model.mask_bank["owl"], statistics=[rows[2] for rows in model.norm_statistics.rows])
    views, expected = [view, model.with_route("cat")], model(x, route_ids="dog").logits
    model.drop_route("cat")
    assert torch.equal(views[0](x).logits, expected)
    with pytest.raises(ValueError, match="unknown route 'cat'"):
        views[1](x)


# Status


def test_status_and_report(build):
    model, _ = build("bert")
    status = model.status()
    json.dumps(status)
    assert [route["name"] for route in status["routes"]] == ["x", "y"] and status["active_route"] is None
    counts = [sum(int(mask.sum()) for mask in model.mask_bank[route]) for route in (0, 1)]
    assert [route["kept"] for route in status["routes"]] == counts
    assert [route["density"] for route in status["routes"]] == [n / model.mask_bank.num_weights for n in counts]
    assert status["num_prunable"] == model.mask_bank.num_weights
    report = model.prunable_report()
    assert all(name in report for name in model.mask_bank.weight_names)
    assert "bert.embeddings.position_embeddings.weight" not in report
    left_out = sum(p.numel() for p in model.backbone.parameters()) - model.mask_bank.num_weights
    assert f"{model.mask_bank.num_weights:,}" in report and f"{left_out:,}" in report
