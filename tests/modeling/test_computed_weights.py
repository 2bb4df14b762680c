"""Layers that change their weights before they multiply by them."""

import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from torch import nn

from hf_rtl import RTLModelForImageClassification
from hf_rtl.modeling.computed_weights import changed_layers, computed_weight


def test_computed_weights_against_the_formula():
    weight = torch.randn(4, 2, 3, 3)
    weight[0], weight[1, 0] = 0, 0
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    standardised = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
    for layer in (StdConv2d(4, 4, 3, groups=2), ScaledStdConv2dSame(4, 4, 3, groups=2, stride=2, dilation=2)):
        scale = layer.gain * layer.scale if isinstance(layer, ScaledStdConv2dSame) else 1
        found = computed_weight(layer, weight)
        torch.testing.assert_close(found, standardised * scale, rtol=1e-5, atol=1e-6)
        assert not found[0].any() and found[1].all()  # a filter without any weight stays empty
        assert "weight" not in layer.__dict__


def test_which_layers_change_their_weights():
    backbone = nn.ModuleList([nn.Conv2d(2, 2, 3), Conv2dSame(2, 2, 3), ScaledStdConv2d(2, 2, 3), nn.Linear(3, 3)])
    backbone.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    assert list(changed_layers(backbone, [f"{index}.weight" for index in range(4)])) == ["2.weight"]


def test_the_report_says_what_is_zero_where_it_counts(fill_masks, caplog):
    model = RTLModelForImageClassification.from_backbone(
        "test_nfnet", route_names=["x", "y"], ticket_task="membership"
    )
    inside = [m.weight.numel() for m in timm.create_model("test_nfnet").modules() if isinstance(m, ScaledStdConv2d)]
    assert f"{sum(inside):,} of the {model.mask_bank.num_weights:,} prunable weights" in caplog.text
    fill_masks(model)
    for layer in model.backbone.modules():
        if isinstance(layer, ScaledStdConv2d):
            layer.gain.data.fill_(1)
    line = model.prunable_report().splitlines()[-1]
    assert (
        line.startswith(f"{sum(inside):,} of the prunable weights") and "0% are zero where the layers compute" in line
    )
    caplog.clear()
    plain = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["x", "y"], ticket_task="membership"
    )
    assert "standardise" not in plain.prunable_report() and not caplog.text
