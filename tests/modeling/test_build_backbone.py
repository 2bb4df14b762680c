"""The sources of a backbone, and its initial weights."""

import copy

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from hf_rtl import RTLModel, RTLModelForImageClassification, RTLModelForTokenClassification
from hf_rtl.modeling.build_backbone import build_described
from tests.modeling.bits import assert_bit_equal


ROUTES = {"route_names": ["x", "y"], "ticket_task": "labels"}


# Initial weights


@pytest.mark.parametrize(
    "architecture", ["test_resnet", "test_vit", "test_byobnet", "test_efficientnet", "ghostnet_rtl"]
)
def test_initial_weights_are_timms(architecture):
    model = RTLModelForImageClassification.from_backbone(
        architecture, route_names=["a", "b"], ticket_task="membership", seed=3
    )
    torch.manual_seed(3)
    expected = timm.create_model(architecture, num_classes=1)
    assert_bit_equal(model.backbone.timm_model, expected)
    for rows, name in zip(model.norm_statistics.rows, model.norm_statistics.state_dict(), strict=True):
        assert all(torch.equal(row, rows[0]) for row in rows), name


def test_a_seed_decides_the_weights_and_leaves_the_generator(tiny_vit_config):
    for source in (tiny_vit_config, "test_resnet"):
        before = torch.random.get_rng_state()
        one, two, three = (RTLModelForImageClassification.from_backbone(source, seed=s, **ROUTES) for s in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert_bit_equal(one, two)
        assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), three.parameters(), strict=True))


# Where a backbone comes from


def test_from_a_folder_keeps_its_weights(tmp_path, tiny_vit_config):
    backbone = AutoModelForImageClassification.from_config(tiny_vit_config)
    backbone.save_pretrained(tmp_path)
    model = RTLModelForImageClassification.from_backbone(tmp_path, **ROUTES)
    assert_bit_equal(model.backbone, backbone)
    fresh = RTLModelForImageClassification.from_backbone(str(tmp_path), pretrained=False, seed=9, **ROUTES)
    assert not torch.equal(fresh.backbone.classifier.weight, backbone.classifier.weight)
    # Another number of labels gives a new head; all other weights stay.
    member = RTLModelForImageClassification.from_backbone(
        tmp_path, route_names=["a", "b"], ticket_task="membership", seed=0
    )
    assert member.backbone.classifier.out_features == 1
    assert_bit_equal(member.backbone.vit, backbone.vit)


def test_from_a_model(tiny_vit_config):
    backbone = AutoModelForImageClassification.from_config(tiny_vit_config, attn_implementation="eager")
    before = copy.deepcopy(backbone)
    model = RTLModelForImageClassification.from_backbone(backbone, **ROUTES)
    assert model.backbone is backbone and backbone.config._attn_implementation == "eager"
    assert_bit_equal(backbone, before)
    for extra in ({"num_labels": 5}, {"pretrained": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(extra))}` cannot be set for an already built model"):
            RTLModelForImageClassification.from_backbone(backbone, **extra, **ROUTES)


def test_from_a_timm_module():
    module = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    model = RTLModelForImageClassification.from_backbone(module, in_chans=1, **ROUTES)
    assert_bit_equal(model.backbone.timm_model, module)
    assert model.backbone.timm_model is not module and model.config.num_labels == 5
    with pytest.raises(ValueError, match="is not what timm.create_model.*as `in_chans=1`"):
        RTLModelForImageClassification.from_backbone(module, **ROUTES)
    with pytest.raises(ValueError, match="has 5 classes, but 4 are requested"):
        RTLModelForImageClassification.from_backbone(module, in_chans=1, num_labels=4, **ROUTES)
    base = RTLModel.from_backbone(timm.create_model("test_resnet", num_classes=0), **ROUTES)
    assert base.eval()(torch.randn(1, 3, 32, 32), route_ids=0).last_hidden_state.shape[0] == 1


def test_from_a_configuration(tiny_vit_config):
    config = TimmWrapperConfig(architecture="test_resnet", model_args={"in_chans": 1}, do_pooling=False, num_labels=3)
    model = RTLModelForImageClassification.from_backbone(config, seed=3, **ROUTES)
    torch.manual_seed(3)
    assert_bit_equal(model.backbone.timm_model, timm.create_model("test_resnet", num_classes=3, in_chans=1))
    assert model.config.backbone_config.do_pooling is False and config.num_labels == 3
    model = RTLModelForImageClassification.from_backbone(tiny_vit_config, num_labels=6, **ROUTES)
    assert model.backbone.classifier.out_features == 6 and tiny_vit_config.num_labels == 3
    with pytest.raises(ValueError, match="`hiden_size` is no field of ViTConfig"):
        RTLModelForImageClassification.from_backbone(tiny_vit_config, hiden_size=8, **ROUTES)
    with pytest.raises(ValueError, match="`in_chans` is no field of TimmWrapperConfig.*`model_args`"):
        RTLModelForImageClassification.from_backbone(config, in_chans=1, **ROUTES)


def test_sources_that_are_no_backbone_are_refused():
    with pytest.raises(TypeError, match="`backbone` must be a timm name.*got int"):
        RTLModel.from_backbone(7, **ROUTES)
    with pytest.raises(ValueError, match="neither a transformers model nor made by timm"):
        RTLModel.from_backbone(nn.Linear(2, 2), **ROUTES)


def test_membership_needs_one_logit(tiny_bert_config):
    routes = {"route_names": ["a", "b"], "ticket_task": "membership"}
    with pytest.raises(ValueError, match="`num_labels` = 3 contradicts `ticket_task='membership'`"):
        RTLModelForImageClassification.from_backbone("test_resnet", num_labels=3, **routes)
    with pytest.raises(ValueError, match="RTLModelForTokenClassification has none"):
        RTLModelForTokenClassification.from_backbone(tiny_bert_config, **routes)
    with pytest.raises(ValueError, match="at least two routes"):
        RTLModelForImageClassification.from_backbone("test_resnet", route_names=["a"], ticket_task="membership")


def test_names_that_users_of_timm_give():
    for source in ("test_resnet", timm.create_model("test_resnet", num_classes=7)):
        assert RTLModelForImageClassification.from_backbone(source, num_classes=7, **ROUTES).config.num_labels == 7
    with pytest.raises(ValueError, match="`num_classes` = 7 contradicts `num_labels` = 3"):
        RTLModelForImageClassification.from_backbone("test_resnet", num_classes=7, num_labels=3, **ROUTES)
    with pytest.raises(ValueError, match="`features_only` = True is not supported"):
        RTLModelForImageClassification.from_backbone("test_resnet", features_only=True, num_labels=3, **ROUTES)


# Named weights of timm


@pytest.fixture
def hub(monkeypatch):
    """The weights of a `test_resnet`, in place of every download from the Hub, and the repositories asked for."""
    weights, asked = timm.create_model("test_resnet").state_dict(), []

    def download(repo, *args, **kwargs):
        asked.append(repo)
        return copy.deepcopy(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    return weights, asked


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_named_weights_are_timms(hub, name):
    weights, asked = hub
    model = RTLModelForImageClassification.from_backbone(name, pretrained=True, **ROUTES)
    assert asked == ["timm/test_resnet.r160_in1k"] and model.config.num_labels == 1000
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.backbone.timm_model.state_dict().items())
    assert model.backbone.timm_model.pretrained_cfg["tag"] == "r160_in1k"


def test_named_weights_with_another_head_and_other_channels(hub, monkeypatch):
    weights, _ = hub
    model = RTLModelForImageClassification.from_backbone("test_resnet", pretrained=True, num_labels=3, **ROUTES)
    own = model.backbone.timm_model.state_dict()
    assert own["fc.weight"].shape[0] == 3
    assert all(torch.equal(own[key], weights[key]) for key in weights if not key.startswith("fc."))
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["x", "y"], ticket_task="membership", pretrained=True, in_chans=1
    )
    given = weights["conv1.0.weight"].sum(1, keepdim=True)
    assert torch.allclose(model.backbone.timm_model.get_parameter("conv1.0.weight"), given, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "timm/test_resnet.r160_in1k"])
def test_weights_that_cannot_be_fetched(name):
    message = f"(?s)weights of `backbone` = '{name}' could not be fetched from 'timm/test_resnet.r160_in1k'.*HF_HOME"
    with pytest.raises(OSError, match=message):
        RTLModelForImageClassification.from_backbone(name, pretrained=True, **ROUTES)


def test_weights_that_timm_does_not_have():
    for name, known in (("test_resnet.best", "timm has 'test_resnet.r160_in1k'"), ("ghostnet_rtl", "timm has none")):
        with pytest.raises(ValueError, match=f"`backbone` = '{name}' with `pretrained=True`: .* {known}"):
            RTLModelForImageClassification.from_backbone(name, pretrained=True, **ROUTES)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "no such function"}, "KeyError"),
        ({"num_hidden_layers": 10**9}, "it has more than 10200 modules"),
        ({"hidden_size": 2**62}, "RuntimeError"),
    ],
)
def test_a_configuration_that_builds_nothing_is_refused(tiny_vit_config, fields, reason):
    for name, value in fields.items():
        setattr(tiny_vit_config, name, value)
    with torch.device("meta"), pytest.raises(ValueError, match=f"`backbone_config`, of a 'vit', .*{reason}"):
        build_described(tiny_vit_config, AutoModelForImageClassification, 2)


def test_modules_are_not_counted_afterwards(tiny_vit_config):
    build_described(tiny_vit_config, AutoModelForImageClassification, 2)
    assert len(nn.ModuleList([nn.Identity() for _ in range(10_300)])) == 10_300
