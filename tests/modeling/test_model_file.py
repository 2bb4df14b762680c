"""Compact files: they are smaller, and hold the same tickets to the bit."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.modeling_outputs import MaskedLMOutput

from hf_rtl import (
    MaskBank,
    RTLModel,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
)
from hf_rtl.modeling.model_file import coded_masks, compact_state, expand_state
from tests.training.small_runs import SMALL_NET


SHAPES = [("a", (3, 5)), ("b", (2, 2, 3, 3)), ("c", (7,)), ("d", (64,))]


def make_bank(num_routes, density=0.3):
    bank = MaskBank(SHAPES, [f"route {k}" for k in range(num_routes)])
    for k in range(num_routes):
        # No ticket keeps a weight of one tensor.
        bank[k] = [torch.rand(shape) < (0 if name == "c" else density) for name, shape in SHAPES]
    return bank


@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
@pytest.mark.parametrize("num_routes", [1, 3, 8, 9, 20])
def test_a_state_comes_back_without_what_no_ticket_keeps(num_routes, density):
    bank = make_bank(num_routes, density)
    weights = [torch.randn(shape) for _, shape in SHAPES]
    keys = [f"backbone.{name}" for name, _ in SHAPES]
    state = dict(zip(keys, weights, strict=True)) | {f"mask_bank.{name}": rows for name, rows in bank.named_buffers()}
    state |= {"backbone.bias": torch.randn(2), "backbone.a.alias": weights[0].view(-1)}
    compact, codings = compact_state(state, weights, bank)
    expanded = expand_state(compact, codings, keys, MaskBank(SHAPES, bank.route_names))
    assert expanded.keys() == state.keys() - {"backbone.a.alias"}
    for index, (key, weight) in enumerate(zip(keys, weights, strict=True)):
        kept = [any(bool(bank[k][index].view(-1)[i]) for k in range(num_routes)) for i in range(weight.numel())]
        naive = [value if keep else 0.0 for value, keep in zip(weight.view(-1).tolist(), kept, strict=True)]
        assert expanded[key].shape == weight.shape and expanded[key].view(-1).tolist() == naive
        assert torch.equal(expanded[f"mask_bank.m{index:04d}"], bank.packed[index])
        assert compact.get(f"compact.w{index:04d}", torch.empty(0)).numel() == sum(kept)
    assert torch.equal(expanded["backbone.bias"], state["backbone.bias"])
    raw = sum(rows.nbytes for rows in bank.packed)
    masks = [tensor for name, tensor in compact.items() if name in codings or name.startswith("mask_bank")]
    assert sum(tensor.nbytes for tensor in masks) <= raw


def test_similar_tickets_are_coded_in_fewer_bits_than_each_alone():
    bank = MaskBank([("a", (100, 1000))], [f"route {k}" for k in range(10)])
    common = torch.rand(100, 1000)
    for k in range(10):
        bank[k] = [(common < 0.2) & (torch.rand(100, 1000) < 0.95)]
    _, coded = coded_masks(bank)
    coded_bits = 8 * sum(tensor.nbytes for tensor in coded.values()) / bank.num_weights

    def entropy(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    # The code holds the union, and in it a biased coin per ticket; a ticket alone has the entropy of its density.
    # Deflate spends a whole number of bits on a byte.
    assert coded_bits < 1.25 * (entropy(0.2) + 0.2 * 10 * entropy(0.95)) < 10 * entropy(0.19) / 4


# Models


def models(kind, routes=("x", "y", "z")):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    options = {"route_names": list(routes), "ticket_task": "labels", "seed": 0}
    if kind == "bert":
        from transformers import BertConfig

        return RTLModelForSequenceClassification.from_backbone(BertConfig(**small, vocab_size=40), **options)
    if kind == "t5":
        from transformers import T5Config

        config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        return RTLModelForSeq2SeqLM.from_backbone(config, prune_include=["shared.weight"], **options)
    if kind == "tied":
        from transformers import BertConfig

        name = "bert.embeddings.word_embeddings.weight"  # also the output projection's
        return RTLModelForMaskedLM.from_backbone(BertConfig(**small, vocab_size=40), prune_include=[name], **options)
    return RTLModelForImageClassification.from_backbone(SMALL_NET, num_labels=4, **options)


def inputs(kind):
    if kind == "timm":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    tokens = {"input_ids": torch.arange(8).view(2, 4)}
    return tokens | ({"decoder_input_ids": tokens["input_ids"]} if kind == "t5" else {})


@pytest.fixture(params=["timm", "bert", "t5", "tied"])
def kind(request):
    return request.param


@pytest.fixture
def model(kind, fill_masks):
    model = models(kind).eval()
    fill_masks(model, keep=0.2)
    model.mask_bank["y"] = [mask & (torch.rand(mask.shape) < 0.9) for mask in model.mask_bank["x"]]
    for rows in model.norm_statistics.rows:
        rows.copy_((rows + torch.rand(rows.shape)).to(rows.dtype))
    return model


# `make test-long` tries all types with all kinds.
SHORT = [("timm", torch.bfloat16), ("tied", torch.bfloat16), ("t5", torch.float16), ("bert", torch.float16)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[] if dtype == torch.float32 or (kind, dtype) in SHORT else pytest.mark.long)
        for kind in ("timm", "bert", "t5", "tied")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_a_compact_file_gives_the_same_tickets(kind, model, dtype, tmp_path):
    model.to(dtype)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "compact", compact=True)
    assert model.config.compact is None
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "compact")]
    assert sizes[1] < sizes[0]
    loaded = RTLModel.from_pretrained(tmp_path / "compact")
    model = RTLModel.from_pretrained(tmp_path / "full")  # loading keeps some weights of T5 in float32
    assert type(loaded) is type(model) and loaded.dtype == dtype and loaded.config.compact is None
    assert loaded.mask_bank.fingerprint() == model.mask_bank.fingerprint()
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs(kind).items()}
    for route in (0, 1, 2, -1):
        assert torch.equal(loaded(**batch, route_ids=route).logits, model(**batch, route_ids=route).logits)
    whole = dict(model.named_parameters()) | dict(model.named_buffers())
    covered = {f"backbone.{name}" for name in model.mask_bank.weight_names}
    for name, tensor in (dict(loaded.named_parameters()) | dict(loaded.named_buffers())).items():
        if name not in covered:
            assert torch.equal(tensor, whole[name]), name
    for weight, other, union in zip(loaded.masker.weights, model.masker.weights, model.mask_bank.union(), strict=True):
        assert torch.equal(weight, torch.where(union, other, torch.zeros_like(other)))
    # The model can be saved in full, and compact again with the same bytes.
    loaded.save_pretrained(tmp_path / "full-again")
    loaded.save_pretrained(tmp_path / "compact-again", compact=True)
    again = RTLModel.from_pretrained(tmp_path / "full-again")
    assert torch.equal(again(**batch, route_ids=0).logits, model(**batch, route_ids=0).logits)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("compact", "compact-again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@torch.no_grad()
def test_compact_files_in_shards_and_in_another_type(kind, model, tmp_path):
    model.save_pretrained(tmp_path, compact=True, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = RTLModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    batch = {name: t.to(loaded.dtype) if t.is_floating_point() else t for name, t in inputs(kind).items()}
    assert torch.equal(loaded(**batch, route_ids=1).logits, model(**batch, route_ids=1).logits)


def test_a_full_save_replaces_a_compact_one(tmp_path):
    model = models("timm")
    model.save_pretrained(tmp_path, compact=True)
    model.save_pretrained(tmp_path)
    assert not any(name.startswith("compact") for name in load_file(tmp_path / "model.safetensors"))
    assert RTLModel.from_pretrained(tmp_path).config.compact is None


def test_a_single_route_and_an_empty_layer(fill_masks, tmp_path):
    """K = 1 is plain pruning: the only mask is the union."""
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = RTLModelForImageClassification.from_backbone(config, route_names=["all"], ticket_task="labels", seed=0)
    masks = fill_masks(model, keep=0.3)[0]
    model.mask_bank["all"] = [*masks[:-1], torch.zeros_like(masks[-1])]
    model.save_pretrained(tmp_path, compact=True)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert loaded.mask_bank.fingerprint() == model.mask_bank.fingerprint()
    assert not loaded.masker.weights[-1].any()


class HeadFirstConfig(PreTrainedConfig):
    model_type = "head_first_for_tests"


class HeadFirst(PreTrainedModel):
    """A tied weight that is not saved under its first name."""

    config_class = HeadFirstConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(8, 20, bias=False)
        self.embedding = nn.Embedding(20, 8)
        self.dense = nn.Linear(8, 8)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, return_dict=True):
        return MaskedLMOutput(logits=self.head(self.dense(self.embedding(input_ids))))


AutoConfig.register(HeadFirstConfig.model_type, HeadFirstConfig)
AutoModelForMaskedLM.register(HeadFirstConfig, HeadFirst)


@torch.no_grad()
def test_tied_weights_are_saved_under_the_name_that_loading_looks_for(fill_masks, tmp_path):
    config = HeadFirstConfig(tie_word_embeddings=True)
    model = RTLModelForMaskedLM.from_backbone(
        config, route_names=["x", "y"], ticket_task="labels", seed=0, prune_include=["head.weight"]
    ).eval()
    assert model.mask_bank.weight_names == ["head.weight", "dense.weight"]
    fill_masks(model)
    model.save_pretrained(tmp_path, compact=True)
    loaded = RTLModel.from_pretrained(tmp_path)
    assert loaded.backbone.head.weight is loaded.backbone.embedding.weight
    tokens = torch.arange(8).view(2, 4)
    for route in (0, 1, -1):
        assert torch.equal(loaded(tokens, route_ids=route).logits, model(tokens, route_ids=route).logits)


# Damaged files


def damage_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("compact.union"), r"lacks 1 tensor\(s\) of masks \(compact.union\)"),
        (lambda tensors: tensors.pop("compact.w0001"), r"has \(0,\) weights of .*, of which the tickets keep"),
        (lambda tensors: tensors.update({"compact.w0001": torch.zeros(2, 3)}), r"has \(2, 3\) weights"),
        (lambda tensors: tensors.update({"compact.masks": tensors["compact.masks"][:-40]}), "damaged"),
        (lambda tensors: tensors.update({"compact.union": tensors["compact.union"].float()}), "uint8"),
        (lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("bias"))), "lacks 1 tensor"),
    ],
)
def test_a_damaged_compact_file_is_refused(fill_masks, change, message, tmp_path):
    model = models("timm")
    fill_masks(model, keep=0.05)
    model.save_pretrained(tmp_path, compact=True)
    damage_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        RTLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "codings, message",
    [
        ({"compact.union": "pickle", "compact.masks": "raw"}, "must be one of 'raw', 'deflate', got 'pickle'"),
        ({"compact.union": "raw"}, "or the configuration lacks their codings"),
        ({"compact.union": "raw", "compact.masks": "raw"}, "damaged"),
        ({}, "lacks .* of masks"),
    ],
)
def test_a_wrong_coding_is_refused(fill_masks, codings, message, tmp_path):
    model = models("timm")
    fill_masks(model, keep=0.05)
    model.save_pretrained(tmp_path, compact=True)
    damage_config(tmp_path, compact=codings)
    with pytest.raises(ValueError, match=message):
        RTLModel.from_pretrained(tmp_path)


def test_another_bit_in_the_masks_is_seen(fill_masks, tmp_path):
    model = models("timm")
    fill_masks(model, keep=0.5)
    model.mask_bank["y"] = model.mask_bank["z"] = model.mask_bank["x"]
    model.save_pretrained(tmp_path, compact=True)
    config = json.loads((tmp_path / "config.json").read_text())

    def swap(tensors):
        """Swaps two columns, which keeps the length of the code."""
        masks = tensors["compact.masks"]
        assert config["compact"]["compact.masks"] == "deflate"
        bits = torch.full((sum(int(union.sum()) for union in model.mask_bank.union()),), 7, dtype=torch.uint8)
        bits[5] = 3
        from hf_rtl.modeling.mask_coding import encode

        tensors["compact.masks"] = encode(bits)[1]
        assert not torch.equal(tensors["compact.masks"], masks)

    damage_tensors(tmp_path, swap)
    with pytest.raises(ValueError, match="the masks have the fingerprint"):
        RTLModel.from_pretrained(tmp_path)
