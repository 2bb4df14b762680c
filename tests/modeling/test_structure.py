"""What can be saved can be loaded: models that do not follow their configuration are refused before any work."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
)

import hf_rtl
from hf_rtl import (
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSequenceClassification,
    RTLTrainer,
)
from tests.training.small_runs import arguments


ROUTES = {"route_names": ["day", "night"], "ticket_task": "labels", "seed": 0}
TOKENS = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])


def halved(model: RTLModel) -> RTLModel:
    for route in range(model.num_routes):
        model.mask_bank[route] = [torch.rand(shape) < 0.5 for shape in model.mask_bank.shapes]
    return model.eval()


def own_head(bert: nn.Module) -> None:
    bert.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def other_head(bert: nn.Module) -> None:
    bert.classifier = nn.Linear(16, 5)


def fewer_layers(bert: nn.Module) -> None:
    bert.bert.encoder.layer = bert.bert.encoder.layer[:1]


def weight_norm(bert: nn.Module) -> None:
    parametrizations.weight_norm(bert.bert.encoder.layer[0].intermediate.dense)


def low_rank_layers(bert: nn.Module) -> None:
    dense = bert.bert.encoder.layer[0].intermediate.dense
    dense.lora_A, dense.lora_B = nn.Linear(16, 2), nn.Linear(2, 24)


def pruning_of_torch(bert: nn.Module) -> None:
    prune.l1_unstructured(bert.bert.encoder.layer[0].intermediate.dense, "weight", amount=0.5)


CHANGES = {
    own_head: r"classifier\.0\.weight: \[8, 16\] here, nothing there.* 3 more",
    other_head: r"classifier\.weight: \[5, 16\] here, \[3, 16\] there",
    fewer_layers: r"encoder\.layer\.1.*: nothing here, \[16, 16\] there.* 13 more",
    weight_norm: r"dense\.parametrizations\.weight\.original0: \[24, 1\] here, nothing there",
    low_rank_layers: r"lora_A\.weight: \[2, 16\] here, nothing there",
    pruning_of_torch: r"dense.*computes its weight by a hook",
}


@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_changes_before_wrapping(tiny_bert_config, change: Callable, message: str):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    change(backbone)
    with pytest.raises(ValueError, match=message):
        RTLModelForSequenceClassification.from_backbone(backbone, **ROUTES)


# Where a change takes a masked weight away.
WITHOUT_A_WEIGHT = {
    fewer_layers: r"masks are for another backbone: they cover bert\.encoder\.layer\.1",
    weight_norm: r"dense\.weight cannot be masked, as .*ParametrizedLinear has no such weight",
    pruning_of_torch: r"dense\.weight cannot be masked, as .*Linear has no such weight",
}
CHANGES_AFTER = CHANGES | WITHOUT_A_WEIGHT


@pytest.mark.parametrize(("change", "message"), CHANGES_AFTER.items(), ids=[change.__name__ for change in CHANGES])
def test_changes_after_wrapping(tmp_path, tiny_bert_config, change: Callable, message: str):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    change(model.backbone)
    for save in (model.save_pretrained, model.save_tickets, model.push_to_hub):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("replaced", "there"),
    [(nn.Linear(16, 5), r"\(5, 16\)"), (nn.Identity(), "no such parameter"), (None, "no such module")],
)
def test_a_private_head_that_is_replaced(tmp_path, tiny_bert_config, replaced: nn.Module | None, there: str):
    private = {"private_parameters": ["classifier.*"]}
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES, **private).eval()
    masks = [torch.ones(shape, dtype=torch.bool) for shape in model.mask_bank.shapes]
    former, model.backbone.classifier = model.backbone.classifier, replaced
    model.config.num_labels = 5
    args = arguments(tmp_path / "run", route_column="domain")
    data = [{"input_ids": TOKENS[0], "label": i % 2, "domain": i % 4 // 2} for i in range(8)]
    for action in (
        lambda: model(TOKENS, route_ids=0),
        lambda: model.append_ticket("dusk", masks),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: RTLTrainer(model, args, train_dataset=data).train(),
    ):
        with pytest.raises(
            ValueError, match=f"own copy of 'classifier.weight' of shape .*, but the backbone has {there}"
        ):
            action()
    assert model.route_names == ROUTES["route_names"] and not list(tmp_path.glob("run/*"))
    model.backbone.classifier, model.config.num_labels = former, 3
    model(TOKENS, route_ids=0)


@pytest.mark.parametrize("before", [True, False], ids=["before wrapping", "after wrapping"])
def test_a_head_that_the_configuration_can_express(tmp_path, tiny_bert_config, before: bool):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    if before:
        other_head(backbone)
        backbone.config.num_labels = 5
    model = RTLModelForSequenceClassification.from_backbone(backbone, **ROUTES)
    if not before:
        other_head(model.backbone)
        model.config.num_labels = 5
    halved(model).save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path).eval()
    expected = model(TOKENS, route_ids=[0, 1]).logits
    assert expected.shape == (2, 5) and torch.equal(loaded(TOKENS, route_ids=[0, 1]).logits, expected)


@pytest.mark.parametrize("before", [True, False], ids=["before wrapping", "after wrapping"])
def test_another_classifier_of_timm(tmp_path, before: bool):
    network = timm.create_model("test_resnet", num_classes=3)
    if before:
        network.reset_classifier(5)
    model = RTLModelForImageClassification.from_backbone(network, **ROUTES)
    if not before:
        model.backbone.timm_model.reset_classifier(5)
        with pytest.raises(ValueError, match=r"fc\.weight: \[5, 96\] here, \[3, 96\] there.*num_labels"):
            model.save_pretrained(tmp_path / "model")
        model.config.num_labels = 5
    model.save_pretrained(tmp_path)
    assert RTLModel.from_pretrained(tmp_path).config.num_labels == 5


def test_tensors_that_are_shared_by_hand(tmp_path, tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    model = RTLModelForSequenceClassification.from_backbone(copy.deepcopy(backbone), **ROUTES)
    model.backbone.bert.encoder.layer[1].output.LayerNorm = model.backbone.bert.encoder.layer[0].output.LayerNorm
    with pytest.raises(ValueError, match=r"layer\.1.* is the same tensor as .*layer\.0.*untie them"):
        model.save_pretrained(tmp_path / "model")
    backbone.bert.encoder.layer[1] = backbone.bert.encoder.layer[0]
    with pytest.raises(ValueError, match=r"layer\.1.* is the same tensor as .*layer\.0.*untie them"):
        RTLModelForSequenceClassification.from_backbone(backbone, **ROUTES)


def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path, tiny_bert_config):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    own_head(model.backbone)
    data = [{"input_ids": [5, 6, index], "label": index % 2, "route": index // 2 % 2} for index in range(12)]
    trainer = RTLTrainer(model, arguments(tmp_path / "run", route_column="route"), train_dataset=data)
    with pytest.raises(ValueError, match=CHANGES[own_head]):
        trainer.train()
    assert not list((tmp_path / "run").rglob("*"))


def test_a_configuration_of_several_classes(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    backbone = DeiTForImageClassification(DeiTConfig(image_size=8, patch_size=4, **sizes))
    model = halved(RTLModelForImageClassification.from_backbone(backbone, **ROUTES))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 8, 8)
    loaded = RTLModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels, route_ids=[0, 1]).logits, model(pixels, route_ids=[0, 1]).logits)


def test_a_configuration_that_says_something_else(tmp_path, tiny_bert_config):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    model.config.vocab_size = 60
    with pytest.raises(ValueError, match=r"word_embeddings\.weight: \[40, 16\] here, \[60, 16\] there"):
        model.save_pretrained(tmp_path / "model")


def test_other_classes_than_the_configurations(tiny_bert_config, tiny_attention_config):
    class OwnForward(BertForSequenceClassification):
        pass

    cases: list[tuple[Any, Any, str]] = [
        (RTLModelForSequenceClassification, OwnForward(tiny_bert_config), "is a OwnForward, but .* builds a BertForS"),
        (
            RTLModelForMaskedLM,
            BertLMHeadModel(tiny_bert_config),
            "is a BertLMHeadModel, but .* builds a BertForMasked",
        ),
        (RTLModel, BertModel(tiny_bert_config, add_pooling_layer=False), r"pooler\.dense\.weight: nothing here"),
        (
            RTLModelForCausalLM,
            AutoModelForSequenceClassification.from_config(tiny_attention_config),
            "AutoModelForCausalLM builds no model from .* a TinyAttentionConfig.*register",
        ),
    ]
    for task_class, backbone, message in cases:
        with pytest.raises(ValueError, match=message):
            task_class.from_backbone(backbone, **ROUTES)


def test_checks_draw_no_random_numbers(tmp_path, tiny_bert_config):
    backbone = AutoModelForSequenceClassification.from_config(tiny_bert_config)
    state = torch.get_rng_state()
    RTLModelForSequenceClassification.from_backbone(backbone, **ROUTES).save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


VOCABULARIES = [
    (AutoModelForCausalLM, "tiny_gpt2_config"),
    (AutoModelForMaskedLM, "tiny_bert_config"),
    (AutoModelForSequenceClassification, "tiny_bert_config"),
    (AutoModelForSeq2SeqLM, "tiny_t5_config"),
]


@pytest.mark.parametrize(("auto_class", "config"), VOCABULARIES, ids=[auto.__name__ for auto, _ in VOCABULARIES])
@pytest.mark.parametrize("size", [{"new_num_tokens": 33}, {"pad_to_multiple_of": 32}], ids=str)
def test_resized_vocabularies(request: pytest.FixtureRequest, tmp_path, auto_class: Any, config: str, size: dict):
    plain = auto_class.from_config(request.getfixturevalue(config)).eval()
    task_class = getattr(hf_rtl, auto_class.__name__.replace("Auto", "RTL"))
    model = task_class.from_backbone(copy.deepcopy(plain), **ROUTES).eval()
    for resized in (plain, model):
        torch.manual_seed(1)
        resized.resize_token_embeddings(**size)
    num_tokens = plain.config.vocab_size
    assert model.config.vocab_size == num_tokens == size.get("new_num_tokens", 64)
    inputs = {"input_ids": torch.tensor([[num_tokens - 1, 5, 6], [7, 8, num_tokens - 2]])}
    inputs["labels"] = (
        torch.tensor([0, 1]) if auto_class is AutoModelForSequenceClassification else inputs["input_ids"]
    )
    for route_ids in ("day", [0, 1]):
        torch.testing.assert_close(model(**inputs, route_ids=route_ids).logits, plain(**inputs).logits)
    halved(model).save_pretrained(tmp_path)
    output, again = model(**inputs, route_ids=0), RTLModel.from_pretrained(tmp_path).eval()(**inputs, route_ids=0)
    assert torch.equal(again.logits, output.logits) and torch.equal(again.loss, output.loss)
    assert model.get_output_embeddings() is model.backbone.get_output_embeddings()


@pytest.mark.parametrize(
    "choice", [{"prune_include": ["*word_embeddings*"]}, {"private_parameters": ["*word_embeddings*"]}], ids=str
)
def test_vocabularies_that_are_masked_or_private(tiny_bert_config, choice: dict):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES, **choice)
    with pytest.raises(ValueError, match=r"`new_num_tokens` would change .*\(40, 16\) to \(60, 16\)"):
        model.resize_token_embeddings(60)
    assert model.config.vocab_size == 40 and model.get_input_embeddings().num_embeddings == 40
    with pytest.raises(RuntimeError, match="inside a route_context"), model.route_context("day"):
        model.resize_token_embeddings(60)


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_modules_that_are_registered_twice(tmp_path, compact: bool):
    sizes = {"img_size": 32, "embed_dims": [16] * 4, "mlp_ratios": [1] * 4, "serial_depths": [2, 1, 1, 1]}
    backbone_arguments = {**sizes, "parallel_depth": 0, "num_labels": 3}
    model = halved(RTLModelForImageClassification.from_backbone("coat_tiny", **backbone_arguments, **ROUTES))
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels, route_ids=[0, 1]).logits
    model.save_pretrained(tmp_path / "model", compact=compact)
    loaded = RTLModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(pixels, route_ids=[0, 1]).logits, expected)
    blocks = loaded.backbone.timm_model
    assert blocks.serial_blocks1[0].cpe is blocks.cpe1
    model.extract_ticket(1).save_pretrained(tmp_path / "ticket")
    ticket = AutoModelForImageClassification.from_pretrained(tmp_path / "ticket").eval()
    assert torch.equal(ticket(pixels).logits, model(pixels, route_ids=1).logits)
