"""An extracted ticket is a plain model: other software can save, load, export and quantise it."""

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_rtl import (
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
)
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.masking import UNION
from tests.child_processes import run_program
from tests.modeling.bits import tensors
from tests.modeling.small_backbones import build as build_backbone
from tests.modeling.small_backbones import units_found_once


KINDS = {
    "resnet": (RTLModelForImageClassification, AutoModelForImageClassification, "membership", 32),
    "ghostnet": (RTLModelForImageClassification, AutoModelForImageClassification, "membership", 32),
    "vit": (RTLModelForImageClassification, AutoModelForImageClassification, "labels", 8),
    "bert": (RTLModelForSequenceClassification, AutoModelForSequenceClassification, "labels", None),
    "tied bert": (RTLModelForMaskedLM, AutoModelForMaskedLM, "labels", None),
    "t5": (RTLModelForSeq2SeqLM, AutoModelForSeq2SeqLM, "labels", None),
}
ROUTES = (0, "dog", UNION)


@pytest.fixture
def build(request, fill_masks):
    """`build(kind)` returns a model of two routes with random masks and statistics, and inputs for it."""

    def make(kind):
        cls, _, task, size = KINDS[kind]
        sources = {"resnet": "test_resnet", "ghostnet": "ghostnet_rtl"}
        source = sources.get(kind) or request.getfixturevalue(f"tiny_{kind.removeprefix('tied ')}_config")
        include = {"tied bert": ["*word_embeddings.weight"], "t5": ["shared.weight"]}.get(kind, [])
        model = cls.from_backbone(source, route_names=["cat", "dog"], ticket_task=task, prune_include=include, seed=0)
        fill_masks(model)
        for rows in model.norm_statistics.rows:
            rows.copy_(torch.rand(rows.shape) + 0.5 if rows.is_floating_point() else torch.arange(3))
        if size is not None:
            return model.eval(), {"pixel_values": torch.randn(3, 3, size, size)}
        inputs = {"input_ids": torch.randint(2, 40, (3, 6))}
        return model.eval(), inputs if kind != "t5" else {**inputs, "decoder_input_ids": torch.randint(2, 40, (3, 4))}

    return make


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def ours(kind):
    """Modules of hf_rtl in the architecture."""
    return {"hf_rtl.backbones.ghostnet"} if kind == "ghostnet" else set()


# The extracted model


@pytest.mark.parametrize("kind", KINDS)
def test_a_ticket_gives_the_routes_outputs_and_has_nothing_of_ours(build, kind):
    model, inputs = build(kind)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    for route in ROUTES:
        ticket = model.extract_ticket(route)
        assert type(ticket) is type(model.backbone)
        assert torch.equal(logits(ticket, inputs), logits(model, {**inputs, "route_ids": route}))
        values = [value for module in ticket.modules() for value in (module, *vars(module).values())]
        values += [*vars(ticket.config).values(), *vars(getattr(ticket, "generation_config", ticket.config)).values()]
        found = {origin for value in values if (origin := type(value).__module__).startswith("hf_rtl")}
        assert found == ours(kind)
        settings = json.dumps(ticket.config.to_dict(), default=str).replace("ghostnet_rtl", "")
        assert "rtl" not in settings.lower() and "route" not in settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_ticket_and_its_model_share_nothing(build, kind):
    model, _ = build(kind)
    name, frozen = next(iter(model.backbone.named_parameters()))
    frozen.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    ticket = model.train().extract_ticket(1)
    assert ticket.training
    assert [p.requires_grad for p in ticket.parameters()] == [p.requires_grad for p in model.backbone.parameters()]
    assert {t.data_ptr() for t in tensors(ticket).values()}.isdisjoint(t.data_ptr() for t in tensors(model).values())
    with torch.no_grad():
        for tensor in tensors(ticket).values():
            tensor.zero_()
    ticket.config.id2label[0] = "other"
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert "other" not in model.backbone.config.id2label.values()
    tied = {name for name in tensors(ticket) if name not in dict(ticket.named_parameters())}
    assert tied == {name for name in tensors(model.backbone) if name not in dict(model.backbone.named_parameters())}


def test_weights_outside_the_mask_are_zero(build):
    model, _ = build("vit")
    for route, masks in ((0, model.mask_bank[0]), (UNION, model.mask_bank.union())):
        weights = tensors(model.extract_ticket(route))
        for name, mask in zip(model.mask_bank.weight_names, masks, strict=True):
            assert not weights[name][~mask].any() and weights[name][mask].all()


# Labels and pipelines


def test_labels(build):
    model, _ = build("resnet")
    assert model.extract_ticket("dog").config.id2label == {0: "dog"}
    assert model.extract_ticket("dog").config.label2id == {"dog": 0}
    assert model.extract_ticket(UNION).config.id2label == {0: "union"}
    assert model.with_route(0).extract_ticket("dog").config.id2label == {0: "dog"}
    assert model.config.id2label == {0: "cat", 1: "dog"}
    model, _ = build("vit")
    assert model.extract_ticket("dog").config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_a_stock_pipeline_answers_with_the_routes_name(build, tmp_path):
    model, _ = build("resnet")
    model.extract_ticket("dog").save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    images = [torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    classify = pipeline("image-classification", model=str(tmp_path), image_processor=processor)
    pixels = processor(images, return_tensors="pt")
    scores = model(**pixels, route_ids="dog").logits.sigmoid()
    for answer, score in zip(classify(images), scores, strict=True):
        assert [entry["label"] for entry in answer] == ["dog"]
        assert answer[0]["score"] == pytest.approx(score.item(), rel=1e-5)


def test_a_ticket_of_a_loaded_model_is_saved_with_its_label(build, tmp_path):
    model, _ = build("resnet")
    model.save_pretrained(tmp_path / "model")
    ticket = RTLModelForImageClassification.from_pretrained(tmp_path / "model").extract_ticket("dog")
    ticket.save_pretrained(tmp_path / "ticket")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "ticket")
    assert (loaded.config.id2label, loaded.config.label2id) == ({0: "dog"}, {"dog": 0})


# Saved and loaded by others


# Backbones of `small_backbones` that can be saved with fewer units: the library's Auto class of each, and ours.
SMALL = {
    "bert": ("AutoModelForSequenceClassification", RTLModelForSequenceClassification),
    "gpt2": ("AutoModelForCausalLM", RTLModelForCausalLM),
    "llama": ("AutoModelForCausalLM", RTLModelForCausalLM),
    "t5": ("AutoModelForSeq2SeqLM", RTLModelForSeq2SeqLM),
    "vit": ("AutoModelForImageClassification", RTLModelForImageClassification),
    "timm vit": ("AutoModelForImageClassification", RTLModelForImageClassification),
    "bottlenecks": ("AutoModelForImageClassification", RTLModelForImageClassification),
}
WITHOUT_US = """
import copy, json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
for folder, auto in json.loads(Path(sys.argv[1], "cases.json").read_text()).items():
    load = getattr(transformers, auto).from_pretrained
    if folder.endswith("ghostnet"):  # this architecture is ours, so timm has to be told
        try:
            load(folder)
        except ImportError as error:
            assert "architecture 'ghostnet_rtl' is not supported in your version of timm" in str(error)
        else:
            raise AssertionError
        continue
    model = load(folder).eval()
    assert type(model).__module__.startswith("transformers."), folder
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    stored = load_file(folder + "/tensors")
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    case = load_file(folder + "/case")
    expected = case.pop("logits")
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**copy.deepcopy(case)).logits, expected), folder
        torch.testing.assert_close(model(**case).logits, expected, rtol=1e-6, atol=1e-6)
    assert "hf_rtl" not in sys.modules, folder
print("all are loaded")
"""


def save_case(ticket, inputs, folder):
    ticket.save_pretrained(folder)
    save_file({**inputs, "logits": logits(ticket, inputs)}, folder / "case")
    save_file({name: tensor.clone() for name, tensor in tensors(ticket).items()}, folder / "tensors")


@pytest.mark.slow
def test_a_process_without_us_loads_tickets(build, tmp_path):
    """
    Tensors from the library's Auto class are equal to the bit. They stay where they lie in the file, and kernels may
    round differently on unaligned memory, so outputs are compared after copying them.
    """
    cases = {}
    for kind, (_, auto, _, _) in KINDS.items():
        model, inputs = build(kind)
        ticket = model.extract_ticket("dog")
        assert torch.equal(logits(ticket, inputs), logits(model, {**inputs, "route_ids": "dog"}))
        save_case(ticket, inputs, tmp_path / kind)
        cases[str(tmp_path / kind)] = auto.__name__
    for kind, (auto, of_model) in SMALL.items():
        network, inputs = build_backbone(kind)
        model = of_model.from_backbone(network, route_names=["day", "night"], ticket_task="labels").eval()
        masks = dict(zip(model.mask_bank.weight_names, model.mask_bank["night"], strict=True))
        with units_found_once(modeling_rtl):
            for layer in model.unit_layers(inputs):
                for (place, dim), units in layer.places.items() if "pooler" not in layer.name else ():
                    if place in masks:
                        masks[place].index_fill_(dim, units[1::2].flatten(), False)
        model.mask_bank["night"] = list(masks.values())
        small, expected = model.extract_ticket("night", small=True), logits(model, {**inputs, "route_ids": "night"})
        assert small.num_parameters() < network.num_parameters()
        assert (logits(small, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()
        save_case(small, inputs, tmp_path / f"small {kind}")
        cases[str(tmp_path / f"small {kind}")] = auto
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    assert "all are loaded" in run_program(WITHOUT_US, tmp_path, folder=tmp_path).stdout


def test_with_us_a_ticket_of_our_architecture_loads(build, tmp_path):
    model, inputs = build("ghostnet")
    model.extract_ticket("dog").save_pretrained(tmp_path)
    loaded = copy.deepcopy(AutoModelForImageClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(logits(loaded, inputs), logits(model, {**inputs, "route_ids": "dog"}))


# Exported


def _short(*short):
    """All kinds of backbones; those that are not `short` are tried by `make test-long`."""
    return [kind if kind in short else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", _short("resnet", "vit", "tied bert"))
def test_torch_export(build, kind, tmp_path):
    """Exported programs have the route's outputs to the bit; from a file, with another alignment, to rounding."""
    model, inputs = build(kind)
    ticket = model.extract_ticket("dog")
    given = {**inputs, "use_cache": False} if kind == "t5" else inputs  # torch.export cannot return a cache
    program = torch.export.export(ticket, (), given)
    expected = logits(model, {**inputs, "route_ids": "dog"})
    assert torch.equal(logits(program.module(), given), expected)
    torch.export.save(program, tmp_path / "ticket.pt2")
    loaded = torch.export.load(tmp_path / "ticket.pt2").module()
    torch.testing.assert_close(logits(loaded, given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _short("resnet", "bert"))
def test_onnx(build, kind, tmp_path):
    model, inputs = build(kind)
    ticket = model.extract_ticket("dog")
    settings = {}
    if kind == "t5":  # torch cannot decompose its fused attention for ONNX
        ticket.set_attn_implementation("eager")
        settings = {"use_cache": False}
    torch.onnx.export(ticket, kwargs={**inputs, **settings}, dynamo=True, verbose=False).save(tmp_path / "ticket.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ticket.onnx", providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    assert sorted(names) == sorted(inputs)
    answer = session.run(None, {name: inputs[name].numpy() for name in names})[0]
    np.testing.assert_allclose(answer, logits(model, {**inputs, "route_ids": "dog"}), rtol=1e-5, atol=1e-5)


# Quantised


@pytest.mark.parametrize("kind", ["vit", "bert", "t5"])
def test_quantised_to_8_bits_it_is_near_and_pruned_weights_stay_zero(build, kind):
    model, inputs = build(kind)
    ticket = model.extract_ticket("dog")
    quantised = copy.deepcopy(ticket)
    quantize_(quantised, Int8WeightOnlyConfig())
    expected, answer = logits(ticket, inputs), logits(quantised, inputs)
    assert not torch.equal(answer, expected)
    assert (answer - expected).abs().max() < 0.03 * expected.abs().max()
    weights, num_zeros = dict(ticket.named_modules()), 0
    for name, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear):
            zero = weights[name].weight == 0
            assert not layer.weight.dequantize()[zero].any(), name
            num_zeros += int(zero.sum())
    pruned = (mask.numel() - int(mask.sum()) for mask in model.mask_bank["dog"])
    assert num_zeros >= sum(pruned) / 2
