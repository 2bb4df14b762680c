"""A setting on a routed model's configuration has the effect that it has on the plain model."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    SegformerConfig,
)

import hf_rtl
from hf_rtl import RTLModel, RTLModelForSequenceClassification, RTLTrainer
from tests.training.small_runs import arguments


ROUTES = {"route_names": ["day", "night"], "ticket_task": "labels"}
PADDED = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SEGFORMER = SegformerConfig(
    num_encoder_blocks=1,
    depths=[1],
    sr_ratios=[1],
    hidden_sizes=[8],
    patch_sizes=[7],
    strides=[4],
    num_attention_heads=[1],
    decoder_hidden_size=8,
    num_labels=3,
)
SEGMENTS = torch.arange(2 * 32 * 32).view(2, 32, 32) % 3


def both(auto_class: Any, config: Any) -> tuple[nn.Module, RTLModel]:
    """A plain model and a routed one with the same weights, whose masks keep everything."""
    plain = auto_class.from_config(copy.deepcopy(config)).eval()
    task_class = getattr(hf_rtl, auto_class.__name__.replace("Auto", "RTL"))
    routed = task_class.from_backbone(copy.deepcopy(plain), **ROUTES).eval()
    return plain, routed


def set_pad_token(model: Any) -> None:
    model.config.pad_token_id = 0


def use_no_cache(model: Any) -> None:
    model.config.use_cache = False


def return_hidden_states(model: Any) -> None:
    model.config.output_hidden_states = True


def return_a_tuple(model: Any) -> None:
    model.config.return_dict = False


def ignore_second_label(model: Any) -> None:
    model.config.semantic_loss_ignore_index = 1


def start_with_token_three(model: Any) -> None:
    model.config.decoder_start_token_id = 3


def regress(model: Any) -> None:
    model.config.problem_type = "multi_label_classification"


TARGETS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
SETTINGS = [
    (set_pad_token, AutoModelForSequenceClassification, "tiny_gpt2_config", {"input_ids": PADDED}),
    (use_no_cache, AutoModelForCausalLM, "tiny_gpt2_config", {"input_ids": PADDED}),
    (return_hidden_states, AutoModelForSequenceClassification, "tiny_bert_config", {"input_ids": PADDED}),
    (return_a_tuple, AutoModelForSequenceClassification, "tiny_bert_config", {"input_ids": PADDED}),
    (regress, AutoModelForSequenceClassification, "tiny_bert_config", {"input_ids": PADDED, "labels": TARGETS}),
    (start_with_token_three, AutoModelForSeq2SeqLM, "tiny_t5_config", {"input_ids": PADDED, "labels": PADDED}),
    (
        ignore_second_label,
        AutoModelForSemanticSegmentation,
        SEGFORMER,
        {"pixel_values": IMAGES, "labels": SEGMENTS},
    ),
]


def content(output: Any) -> list[tuple[str, Any]]:
    """The names and values of an output."""
    return list(output.items() if hasattr(output, "items") else enumerate(output))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, two, rtol=0, atol=1e-6)
    return not isinstance(one, tuple) or all(map(same, one, two))


@pytest.mark.parametrize(
    ("setting", "auto_class", "config", "inputs"), SETTINGS, ids=[setting.__name__ for setting, *_ in SETTINGS]
)
def test_settings_by_hand(
    request: pytest.FixtureRequest, tmp_path, setting: Callable, auto_class: Any, config: Any, inputs: dict
):
    if isinstance(config, str):
        config = request.getfixturevalue(config)
        config.num_labels = 3
    plain, routed = both(auto_class, config)
    for model in (plain, routed):
        setting(model)
    routed.save_pretrained(tmp_path)
    for model in (routed, RTLModel.from_pretrained(tmp_path).eval()):
        for route_ids in ("day", [0, 1]):
            expected, found = content(plain(**inputs)), content(model(**inputs, route_ids=route_ids))
            if route_ids == [0, 1]:  # caches of several routes are never merged
                expected = [(name, value) for name, value in expected if name not in ("cache", "past_key_values")]
            assert [name for name, _ in found] == [name for name, _ in expected]
            assert all(same(one, two) for (_, one), (_, two) in zip(expected, found, strict=True))


def test_the_type_of_the_backbone_stays_its_own(tmp_path, tiny_bert_config):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, num_labels=2, **ROUTES)
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path)
    types = [
        loaded.config.model_type,
        loaded.backbone.config.model_type,
        loaded.extract_ticket("day").config.model_type,
    ]
    assert types == ["rtl", "bert", "bert"]


def test_keywords_of_from_pretrained(tmp_path, tiny_bert_config):
    RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES).save_pretrained(tmp_path)
    model = RTLModel.from_pretrained(
        tmp_path, hidden_dropout_prob=0.25, output_attentions=True, id2label={0: "ant", 1: "bee", 2: "cat"}
    )
    assert {module.p for name, module in model.named_modules() if name.endswith("output.dropout")} == {0.25}
    assert len(model(input_ids=PADDED, route_ids="day").attentions) == 2
    assert model.extract_ticket("day").config.id2label[2] == model.config.id2label[2] == "cat"
    with pytest.raises(TypeError, match="no_such_field"):
        RTLModel.from_pretrained(tmp_path, no_such_field=1)


def test_the_special_tokens_of_a_tokenizer(tmp_path, tiny_gpt2_config):
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(39)} | {"[PAD]": 39}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    data = [{"input_ids": [5 + index % 3] * (1 + index % 4), "label": index % 2} for index in range(12)]
    data = [{**sample, "route": index // 2 % 2} for index, sample in enumerate(data)]
    model = RTLModelForSequenceClassification.from_backbone(tiny_gpt2_config, num_labels=2, **ROUTES)
    args = arguments(tmp_path, target_sparsity=[0.5], prune_amount=0.5, max_steps=1, route_column="route")
    RTLTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer).train()
    saved = RTLModel.from_pretrained(tmp_path / "final")
    assert saved.config.pad_token_id == saved.backbone.config.pad_token_id == 39
    assert saved.extract_ticket("day").config.pad_token_id == 39


def test_decoder_inputs_from_labels(tiny_t5_config):
    plain, routed = both(AutoModelForSeq2SeqLM, tiny_t5_config)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a"
    )
    samples = [{"input_ids": [3, 4], "labels": [5, 6, 7]}, {"input_ids": [3], "labels": [5]}]
    batches = [DataCollatorForSeq2Seq(words, model=model)(samples) for model in (plain, routed)]
    assert torch.equal(batches[0]["decoder_input_ids"], batches[1]["decoder_input_ids"])


def test_a_configuration_made_without_a_model(tmp_path, tiny_bert_config):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, pad_token_id=7)
    assert config.pad_token_id == config.backbone_config.pad_token_id == 7
    config.note = "kept"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).note == "kept"
    assert copy.deepcopy(config).pad_token_id == 7
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field


def test_a_setting_of_a_shallow_copy_stays_there(tiny_bert_config):
    model = RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES)
    copied, before = copy.copy(model.config), model.config.to_dict()
    copied.pad_token_id, copied.id2label, copied.note, copied.thresholds = 7, {0: "ant", 1: "bee"}, "new", [0.5, 0.5]
    assert copied.backbone_config.pad_token_id == 7
    assert model.config.to_dict() == before and not hasattr(model.config, "note")
    model.drop_route("night")
    model.set_router(None)
    assert model.config.backbone_config is model.backbone.config


def test_what_is_edited_in_a_file_has_an_effect(tmp_path, tiny_bert_config):
    RTLModelForSequenceClassification.from_backbone(tiny_bert_config, **ROUTES).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    edited = json.loads(file.read_text())
    assert not edited.keys() & {"id2label", "problem_type", "return_dict"}  # which stand in one place alone
    edited["backbone_config"] |= {"problem_type": "regression", "id2label": {"0": "ant", "1": "bee", "2": "cat"}}
    file.write_text(json.dumps(edited))
    config = RTLModel.from_pretrained(tmp_path).config
    assert config.problem_type == "regression" and config.id2label[2] == "cat"
