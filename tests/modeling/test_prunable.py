"""The default choice of prunable weights, against lists by hand and against the types of modules."""

import copy

import pytest
import timm
import torch
import torch.nn.utils.prune
from timm.layers import CondConv2d
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    LongcatFlashConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    ResNetConfig,
    SwitchTransformersConfig,
)

from hf_rtl import RTLModelForImageClassification, RTLModelForSequenceClassification
from hf_rtl.modeling.build_backbone import build_backbone
from hf_rtl.modeling.prunable import (
    coverage_table,
    parameter_aliases,
    parameter_at,
    select_prunable,
    uncovered_matrices,
    warn_of_low_coverage,
)


BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BERT_ENCODER = [f"bert.encoder.layer.{index}.{part}.weight" for index in (0, 1) for part in BERT_LAYER]


def names(backbone, **patterns):
    return [name for name, _ in select_prunable(backbone, **patterns)]


def test_names_and_shapes_are_those_of_the_parameters(tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    chosen = select_prunable(backbone)
    parameters = dict(backbone.named_parameters())
    assert [(name, tuple(parameters[name].shape)) for name, _ in chosen] == chosen
    assert chosen[4] == ("bert.encoder.layer.0.intermediate.dense.weight", (24, 16))


def test_bert_classifier(tiny_bert_config):
    """The pooler is inside the base model, the classifier outside; embeddings and norms are never chosen."""
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    assert names(backbone) == [*BERT_ENCODER, "bert.pooler.dense.weight"]


def test_bert_masked_lm_with_tied_embeddings(tiny_bert_config):
    backbone = AutoModelForMaskedLM.from_config(tiny_bert_config)
    embedding = backbone.bert.embeddings.word_embeddings
    assert backbone.cls.predictions.decoder.weight is embedding.weight
    assert names(backbone) == BERT_ENCODER
    # Either of its names selects the tied tensor, once, under its first name.
    tied = "bert.embeddings.word_embeddings.weight"
    for pattern in ("*word_embeddings.weight", "cls.predictions.decoder.weight"):
        assert names(backbone, include=[pattern]) == [tied, *BERT_ENCODER]
        assert names(backbone, include=["*"], exclude=[pattern]).count(tied) == 0
    places = parameter_aliases(backbone)[tied]
    assert places == [(embedding, "weight"), (backbone.cls.predictions.decoder, "weight")]
    assert parameter_at(places[1]) is embedding.weight


def test_bert_masked_lm_with_untied_embeddings(tiny_bert_config):
    tiny_bert_config.tie_word_embeddings = False
    backbone = AutoModelForMaskedLM.from_config(tiny_bert_config)
    assert backbone.cls.predictions.decoder.weight is not backbone.bert.embeddings.word_embeddings.weight
    assert names(backbone) == BERT_ENCODER


@pytest.mark.parametrize("tied", [True, False])
def test_t5(tiny_t5_config, tied):
    """No `base_model`: the head is the output embeddings. Relative position biases are embeddings."""
    tiny_t5_config.tie_word_embeddings = tied
    backbone = AutoModelForSeq2SeqLM.from_config(tiny_t5_config)
    attention, dense = [f"SelfAttention.{x}" for x in "qkvo"], ["DenseReluDense.wi", "DenseReluDense.wo"]
    encoder = [[f"layer.0.{x}" for x in attention], [f"layer.1.{x}" for x in dense]]
    cross = [f"layer.1.EncDecAttention.{x}" for x in "qkvo"]
    decoder = [[f"layer.0.{x}" for x in attention], cross, [f"layer.2.{x}" for x in dense]]
    expected = []
    for side, parts in (("encoder", encoder), ("decoder", decoder)):
        for block in (0, 1):
            expected += [f"{side}.block.{block}.{part}.weight" for group in parts for part in group]
    assert names(backbone) == expected
    assert len(names(backbone, include=["shared.weight"])) == len(expected) + 1


def test_gpt2(tiny_gpt2_config):
    backbone = AutoModelForCausalLM.from_config(tiny_gpt2_config)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(backbone) == [f"transformer.h.{block}.{part}.weight" for block in (0, 1) for part in parts]
    assert dict(select_prunable(backbone))["transformer.h.0.attn.c_attn.weight"] == (16, 48)  # transposed


def test_vit(tiny_vit_config):
    backbone = AutoModelForImageClassification.from_config(tiny_vit_config)
    chosen = names(backbone)
    types = {f"{name}.weight": type(module) for name, module in backbone.named_modules()}
    assert chosen == [n for n, t in types.items() if t in (nn.Linear, nn.Conv2d) and n != "classifier.weight"]
    assert "vit.embeddings.patch_embeddings.projection.weight" in chosen and len(chosen) == 1 + 2 * 6
    # A model without a head is the base model, including the pooler.
    base = AutoModel.from_config(tiny_vit_config)
    assert names(base) == [name.removeprefix("vit.") for name in chosen] + ["pooler.dense.weight"]


def test_transformers_resnet():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    backbone = AutoModelForImageClassification.from_config(config)
    types = {f"{name}.weight": type(module) for name, module in backbone.named_modules()}
    assert names(backbone) == [name for name, kind in types.items() if kind is nn.Conv2d]
    assert sum(kind is nn.Linear for kind in types.values()) == 1


@pytest.mark.parametrize(
    "architecture, head", [("test_resnet", "fc"), ("test_vit", "head"), ("test_byobnet", "head.fc")]
)
def test_timm(architecture, head):
    backbone = build_backbone(architecture, AutoModelForImageClassification, num_labels=3)
    types = {name: type(module) for name, module in backbone.named_modules()}
    assert types[f"timm_model.{head}"] is nn.Linear
    expected = [f"{name}.weight" for name, kind in types.items() if issubclass(kind, (nn.Linear, nn.Conv2d))]
    expected.remove(f"timm_model.{head}.weight")
    assert names(backbone) == expected
    assert names(backbone, include=[f"*.{head}.weight"]) == [*expected, f"timm_model.{head}.weight"]


def test_a_timm_model_without_a_head():
    backbone = build_backbone("test_resnet", AutoModel)
    with_head = build_backbone("test_resnet", AutoModelForImageClassification, num_labels=3)
    assert names(backbone) == names(with_head)


def test_a_timm_model_with_two_heads():
    backbone = build_backbone(
        "deit_tiny_distilled_patch16_224", AutoModelForImageClassification, num_labels=3, depth=1
    )
    model = backbone.timm_model
    assert isinstance(model.get_classifier(), tuple)
    chosen = names(backbone)
    assert len(chosen) == 1 + 4 and not any("head" in name for name in chosen)


def test_multihead_attention(tiny_attention_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_attention_config)
    per_layer = ("attention.in_proj_weight", "attention.out_proj.weight", "dense.weight")
    # Without a `base_model` every linear layer is inside.
    expected = [f"layers.{index}.{name}" for index in (0, 1) for name in per_layer] + ["head.weight"]
    assert names(backbone) == expected
    assert names(backbone, exclude=["head.*"]) == expected[:-1]


def test_multihead_attention_with_separate_projections_and_biases():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)])
    projections = ["0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight", "0.out_proj.weight"]
    assert names(model) == projections
    assert model[0].bias_k.ndim == 3  # large enough, but not the weight of a layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 3),
        nn.Conv1d(2, 3, 2),
        nn.Conv2d(2, 3, 2),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose1d(2, 3, 2),
        nn.ConvTranspose2d(2, 3, 2),
        nn.ConvTranspose3d(2, 3, 2),
    ],
)
def test_layers_with_a_prunable_weight(layer):
    assert select_prunable(nn.Sequential(layer)) == [("0.weight", tuple(layer.weight.shape))]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(2, 3),
        nn.BatchNorm2d(3),
        nn.LayerNorm(3),
        nn.LayerNorm((3, 3)),
        nn.GroupNorm(1, 3),
        nn.Bilinear(2, 2, 2),
    ],
)
def test_layers_without_one(layer):
    with pytest.raises(ValueError, match="no prunable weight; name some with `prune_include`"):
        select_prunable(nn.Sequential(layer))


def test_a_tied_tensor_counts_once_and_is_left_out_if_any_place_is():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tied[3].weight = tied[2].weight
    assert names(tied) == ["0.weight"]
    assert names(tied, include=["3.weight"]) == ["0.weight", "2.weight"]
    assert names(tied, include=["2.weight", "3.weight"], exclude=["1.weight"]) == ["2.weight"]
    twice = nn.Sequential(tied[0], nn.ReLU(), tied[0])
    assert names(twice) == ["0.weight"]
    assert len(parameter_aliases(twice)["0.weight"]) == 1


def test_include_adds_and_exclude_is_stronger(tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    default = names(backbone)
    assert set(names(backbone, include=["classifier.weight"])) == {*default, "classifier.weight"}
    assert set(names(backbone, include=["*position_embeddings*"])) - set(default) == {
        "bert.embeddings.position_embeddings.weight"
    }
    assert names(backbone, exclude=["*.layer.0.*"]) == [name for name in default if ".layer.0." not in name]
    assert names(backbone, include=["classifier.weight"], exclude=["classifier.*"]) == default
    # Order is that of the modules, not of the patterns.
    both = names(backbone, include=["classifier.weight", "*word_embeddings.weight"])
    assert both == ["bert.embeddings.word_embeddings.weight", *default, "classifier.weight"]


def test_include_never_adds_vectors_or_biases(tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    everything = names(backbone, include=["*"])
    matrices = [name for name, parameter in backbone.named_parameters() if parameter.ndim >= 2]
    assert everything == matrices
    for pattern in ("*LayerNorm.weight", "*.bias"):
        with pytest.raises(ValueError, match="matches no weight"):
            names(backbone, include=[pattern])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(tiny_bert_config, argument):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    with pytest.raises(ValueError, match=rf"`prune_{argument}` has the pattern 'layer.0'.*as in '\*layer.0\*'"):
        names(backbone, **{argument: ["*.weight", "layer.0"]})


def test_nothing_left_to_prune(tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    with pytest.raises(ValueError, match="no prunable weight"):
        names(backbone, exclude=["*"])


def test_choosing_changes_nothing(tiny_bert_config):
    backbone = AutoModelForMaskedLM.from_config(tiny_bert_config)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    names(backbone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("in_chans, expected", [(1, 125_544), (3, 125_832)])
def test_ghostnet_leaves_out_squeeze_excitation(in_chans, expected):
    model = RTLModelForImageClassification.from_backbone(
        "ghostnet_rtl", route_names=["a", "b"], ticket_task="membership", in_chans=in_chans
    )
    assert model.mask_bank.num_weights == expected
    assert not any(".se." in name for name in model.mask_bank.weight_names)
    assert "timm_model.conv_head.weight" in model.mask_bank.weight_names
    assert model.config.prune_exclude == list(timm.create_model("ghostnet_rtl").rtl_prune_exclude)
    # Given patterns replace those of the backbone.
    all_of_them = RTLModelForImageClassification.from_backbone(
        "ghostnet_rtl", route_names=["a", "b"], ticket_task="membership", in_chans=in_chans, prune_exclude=()
    )
    convolutions = [m for m in all_of_them.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert all_of_them.mask_bank.num_weights == sum(layer.weight.numel() for layer in convolutions) > expected


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 12, "vocab_size": 40, "pad_token_id": 0, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LONGCAT = SMALL | {
    "num_hidden_layers": 2, "num_layers": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12,
    "n_routed_experts": 4, "zero_expert_num": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SWITCH = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "num_experts": 4,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "vocab_size": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, experts, routers",
    [
        (MixtralConfig(**SMALL), ["gate_up_proj", "down_proj"], ["mlp.gate.weight"]),
        (Qwen2MoeConfig(**SMALL), ["gate_up_proj", "down_proj"], ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]),
        (GptOssConfig(**SMALL), ["gate_up_proj", "down_proj"], ["mlp.router.weight"]),
        (GraniteMoeConfig(**SMALL), ["gate_up_proj", "down_proj"], ["block_sparse_moe.router.weight"]),
        (
            JetMoeConfig(**SMALL, kv_channels=8),
            ["mlp.input_linear.weight", "mlp.output_linear.weight", "experts.input_linear.weight"],
            ["mlp.router.layer.weight", "experts.router.layer.weight"],
        ),
        (LongcatFlashConfig(**LONGCAT), ["gate_up_proj", "down_proj"], ["mlp.router.classifier.weight"]),
        (SwitchTransformersConfig(**SWITCH), ["expert_3.wi.weight"], ["mlp.router.classifier.weight"]),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_experts_are_prunable_and_routers_are_not(config, experts, routers):
    with torch.device("meta"):
        backbone = AutoModel.from_config(config)
    chosen = names(backbone)
    for part in experts:
        assert any(name.endswith(part) for name in chosen), part
    dense = [name for name, parameter in backbone.named_parameters() if parameter.ndim > 1 and name not in chosen]
    left = [name for name in dense if not any(part in name for part in ("embed", "shared.weight", "bias"))]
    assert left and all(any(name.endswith(router) for router in routers) for name in left)
    assert all(any(name.endswith(router) for name in left) for router in routers)
    assert not uncovered_matrices(backbone, chosen)


def test_conditional_convolutions():
    with torch.device("meta"):
        backbone = nn.ModuleDict({"timm_model": timm.create_model("tf_efficientnet_cc_b0_4e")})
    backbone.timm_model = backbone["timm_model"]
    chosen = names(backbone)
    layers = dict(backbone.named_modules())
    assert {f"{name}.weight" for name, layer in layers.items() if isinstance(layer, CondConv2d)} < set(chosen)
    assert any("routing_fn" in name for name in layers) and not any("routing_fn" in name for name in chosen)


def test_a_parameter_that_only_looks_like_a_stack():
    class Part(nn.Module):
        def __init__(self, shape, name):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            self.dense = nn.Linear(4, 2)

    assert names(Part((2, 3, 4), "kernel")) == ["kernel", "dense.weight"]
    for shape, name in (
        ((1, 3, 4), "queries"),
        ((3, 1, 1), "temperature"),
        ((2, 3, 4), "seg_embed"),
        ((2, 3, 4), "up_bias"),
        ((3, 4), "table"),
    ):
        assert names(Part(shape, name)) == ["dense.weight"]


def test_low_coverage_warns(caplog):
    backbone = nn.ModuleDict({"dense": nn.Linear(4, 4), "layers": nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])})
    backbone["embedding"] = nn.Embedding(900, 4)
    chosen = select_prunable(backbone)
    warn_of_low_coverage(backbone, chosen, exclude=())
    assert "cover 16 of the 272 weights in matrices" in caplog.text and "(6%)" in caplog.text
    patterns = ["layers.*.weight_ih_l0", "layers.*.weight_hh_l0"]
    assert f"`prune_include={patterns}` covers the rest" in caplog.text
    everything = select_prunable(backbone, include=patterns)
    assert not uncovered_matrices(backbone, [name for name, _ in everything])
    assert "matrices that no mask covers                                                            256" in (
        coverage_table(backbone, ["dense.weight"])
    )
    caplog.clear()
    warn_of_low_coverage(backbone, everything, exclude=())
    warn_of_low_coverage(backbone, chosen, exclude=["layers.*"])  # whoever leaves them out knows that
    assert not caplog.text


class Quantised(torch.Tensor):
    """A tensor of another class than torch's, as those of torchao and bitsandbytes."""


def quantised_tensor(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))


def integers(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def dynamically(layer):
    layer.quantised = torch.ao.nn.quantized.dynamic.Linear(2, 2)


def copied(layer):  # as layers of I-BERT
    layer.register_buffer("weight_integer", torch.zeros_like(layer.weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (quantised_tensor, "dense.weight cannot be masked: it is a Quantised of torch.float32"),
        (integers, "dense.weight cannot be masked: it is a Parameter of torch.int8"),
        (dynamically, r"dense.quantised \(torch.ao.nn.quantized.*Linear\) is quantised"),
        (copied, "dense .* is quantised: .*another of the same shape, `weight_integer`"),
        (lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5), "computes its weight by a hook"),
        (nn.utils.weight_norm, "computes its weight by a hook"),
        (nn.utils.spectral_norm, "computes its weight by a hook"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_that_masks_cannot_cover(tiny_bert_config, change, message):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    change(backbone.bert.pooler.dense)
    with pytest.raises(ValueError, match=message):
        RTLModelForSequenceClassification.from_backbone(backbone, route_names=["a"], ticket_task="labels")


@pytest.mark.parametrize("change", [quantised_tensor, integers, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_that_change_after_wrapping(tiny_bert_config, change, tmp_path):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, route_names=["a"], ticket_task="labels")
    kept = model.backbone.bert.pooler.dense
    model.backbone.bert.pooler.dense = changed = copy.deepcopy(kept)
    change(changed)
    ids = torch.ones(2, 5, dtype=torch.long)
    for call in (
        lambda: model(ids, route_ids=0),
        lambda: model(ids, route_ids=[0, 0]),
        lambda: model.extract_ticket(0),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.save_tickets(tmp_path),
    ):
        with pytest.raises(ValueError, match="cannot be masked.*quantised.*extract_ticket"):
            call()
        assert not model.active.held
    model.backbone.bert.pooler.dense = kept
    assert torch.equal(model.eval()(ids, route_ids=0).logits, model.backbone.eval()(ids).logits)


def test_a_quantisation_when_loading(tiny_bert_config, tmp_path):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, route_names=["a"], ticket_task="labels")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`quantization_config` is not for a routed model.*extract_ticket"):
        RTLModelForSequenceClassification.from_pretrained(tmp_path, quantization_config={"quant_method": "torchao"})
    backbone = model.extract_ticket(0)
    backbone.hf_quantizer = object()
    with pytest.raises(ValueError, match="is quantised"):
        select_prunable(backbone)
