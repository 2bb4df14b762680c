import fnmatch

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, TimmWrapperForImageClassification

from hf_rtl.backbones import GhostNetRTL


# What the paper lists, bottleneck by bottleneck: name, channels in and out, kernel, stride, squeeze-excitation.
BOTTLENECKS = [
    ("blocks.0.0", 16, 16, 3, 1, False),
    ("blocks.1.0", 16, 24, 3, 2, False),
    ("blocks.2.0", 24, 24, 3, 1, False),
    ("blocks.3.0", 24, 40, 5, 2, True),
    ("blocks.4.0", 40, 40, 5, 1, True),
    ("blocks.5.0", 40, 80, 3, 2, False),
    ("blocks.6.0", 80, 80, 3, 1, False),
    ("blocks.6.1", 80, 80, 3, 1, False),
    ("blocks.6.2", 80, 80, 3, 1, False),
]


def create(**kwargs) -> GhostNetRTL:
    torch.manual_seed(0)
    return timm.create_model("ghostnet_rtl", **kwargs)


def prunable(model: GhostNetRTL) -> dict[str, int]:
    """The sizes of the convolution weights that `rtl_prune_exclude` leaves."""
    weights = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {
        name: weight.numel()
        for name, weight in weights.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in model.rtl_prune_exclude)
    }


def shapes_along(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Input and output shape of every module in one forward pass."""
    shapes = {}

    def record(name):
        def hook(module, inputs, output):
            shapes[name] = (tuple(inputs[0].shape), tuple(output.shape))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    model(x)
    for handle in handles:
        handle.remove()
    return shapes


def test_is_registered():
    assert "ghostnet_rtl" in timm.list_models()
    assert "ghostnet_rtl" not in timm.list_models(pretrained=True)
    assert isinstance(create(), GhostNetRTL)


def test_pretrained_weights_are_refused():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ghostnet_rtl"):
        create(pretrained=True)


@pytest.mark.parametrize(("in_chans", "expected"), [(1, 125_544), (3, 125_832)])
def test_num_prunable_weights(in_chans, expected):
    sizes = prunable(create(num_classes=1, in_chans=in_chans))
    assert sum(sizes.values()) == expected
    assert sizes["conv_stem.weight"] == 16 * in_chans * 9
    assert sizes["blocks.7.0.conv.weight"] == 80 * 184
    assert sizes["conv_head.weight"] == 184 * 128


def test_prune_exclude_names_squeeze_excitation_only():
    names = [name for name, _ in create().named_parameters()]
    excluded = {name for pattern in GhostNetRTL.rtl_prune_exclude for name in fnmatch.filter(names, pattern)}
    assert excluded == {
        f"blocks.{stage}.0.se.{conv}.{kind}"
        for stage in (3, 4)
        for conv in ("conv_reduce", "conv_expand")
        for kind in ("weight", "bias")
    }


def test_shapes_follow_the_paper():
    model = create(num_classes=10).eval()
    shapes = shapes_along(model, torch.randn(4, 3, 32, 32))
    size = 16  # the stem halves 32
    assert shapes["conv_stem"] == ((4, 3, 32, 32), (4, 16, size, size))
    for name, in_chs, out_chs, kernel, stride, has_se in BOTTLENECKS:
        out_size = size // stride
        assert shapes[name] == ((4, in_chs, size, size), (4, out_chs, out_size, out_size))
        block = model.get_submodule(name)
        assert (block.se is not None) == has_se
        if stride > 1:
            assert block.conv_dw.kernel_size == (kernel, kernel)
        size = out_size
    assert [name for name, m in model.named_modules() if type(m).__name__ == "GhostBottleneck"] == [
        name for name, *_ in BOTTLENECKS
    ]
    assert shapes["blocks.7"] == ((4, 80, 2, 2), (4, 184, 2, 2))
    assert shapes["conv_head"] == ((4, 184, 1, 1), (4, 128, 1, 1))
    assert shapes["classifier"] == ((4, 128), (4, 10))


def test_is_the_beginning_of_timms_ghostnet():
    def shapes(model):
        return {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if name.startswith(("conv_stem", "bn1")) or name.startswith(tuple(name for name, *_ in BOTTLENECKS))
        }

    assert shapes(create()) == shapes(timm.create_model("ghostnet_100"))


@pytest.mark.parametrize(("in_chans", "size"), [(3, 32), (1, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward(in_chans, size, training):
    model = create(num_classes=1, in_chans=in_chans).train(training)
    logits = model(torch.randn(4, in_chans, size, size))
    assert logits.shape == (4, 1)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_features_and_head_compose():
    model = create().eval()
    x = torch.randn(4, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (4, 184, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (4, 128)
    levels = create(features_only=True).eval()(x)
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 16, 16), (24, 8, 8), (40, 4, 4), (80, 2, 2)]


def test_does_not_drop_by_default():
    model = create()
    assert model.drop_rate == 0.0
    features = torch.randn(4, 184, 2, 2)
    assert torch.equal(model.forward_head(features), model.forward_head(features))


def test_classifier():
    model = create(num_classes=3)
    assert model.get_classifier() is model.classifier
    assert isinstance(model.classifier, nn.Linear)
    assert (model.classifier.in_features, model.classifier.out_features) == (128, 3)
    model.reset_classifier(5)
    assert model.classifier.weight.shape == (5, 128)
    headless = create(num_classes=0).eval()
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert headless(torch.randn(4, 3, 32, 32)).shape == (4, 128)


def test_gradient_checkpointing_gives_the_same_gradients():
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = create(num_classes=1)
        model.set_grad_checkpointing(checkpointing)
        model(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_state_dict_round_trip(tmp_path):
    model, other = create(num_classes=2).eval(), timm.create_model("ghostnet_rtl", num_classes=2).eval()
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), other(x))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(x), other(x))


def test_works_inside_timm_wrapper(tmp_path):
    config = AutoConfig.for_model(
        "timm_wrapper", architecture="ghostnet_rtl", model_args={"in_chans": 1}, num_labels=1
    )
    model = AutoModelForImageClassification.from_config(config).eval()
    assert isinstance(model, TimmWrapperForImageClassification)
    assert isinstance(model.timm_model, GhostNetRTL)
    assert sum(prunable(model.timm_model).values()) == 125_544

    # The wrapper initialises weights in its own way, so a seeded timm model is loaded into it.
    model.timm_model.load_state_dict(create(num_classes=1, in_chans=1).state_dict())
    x = torch.randn(4, 1, 8, 8)
    expected = model(pixel_values=x).logits
    assert torch.equal(expected, create(num_classes=1, in_chans=1).eval()(x))

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    assert loaded.config.model_args == {"in_chans": 1}
    assert torch.equal(loaded(pixel_values=x).logits, expected)
