"""A batch of one route: its numbers, infinities, and the restoring of weights."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from transformers import LongformerConfig, WavLMConfig

from hf_rtl import RTLModelForAudioClassification, RTLModelForMaskedLM
from hf_rtl.modeling.mask_bank import pack, unpack_as_integers
from hf_rtl.modeling.masking import UNION, MaskWeights
from hf_rtl.modeling.norm_statistics import NormStatistics
from tests.modeling.naive import (
    BATCH,
    KINDS,
    assert_gradients_close,
    assert_nothing_is_left,
    close,
    naive_gradients,
    naive_ticket,
    read_gradients,
    unite,
)


# One route


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", [1, UNION])
def test_forward_and_gradients_of_a_route(zoo, kind, route):
    model, masks, inputs = zoo(kind)
    mask = unite(masks) if route == UNION else masks[route]
    expected, gradients = naive_gradients(model, mask, inputs, route)
    for way in ("context", "fresh context", "argument", "view"):
        model.zero_grad()
        if way == "argument":
            output = model(**inputs, route_ids=route)
            output.loss.backward()
        elif way == "view":
            output = model.with_route(route)(**inputs)
            output.loss.backward()
        elif way == "context":
            with model.route_context(route):
                output = model(**inputs)
                output.loss.backward()
        else:
            with model.route_context(route, fresh=True):
                output = model(**inputs)
            output.loss.backward()
        close(output.loss, expected.loss)
        close(output.logits, expected.logits)
        assert_gradients_close(model, gradients, [mask])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_ticket_computes_with_the_same_kernels(fill_masks, mode):
    """
    The products of both models with inputs that are not contiguous are computed by another kernel if the weight
    requires a gradient; the first layer is frozen.
    """
    wavlm = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    longformer = LongformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50,
        attention_window=4, max_position_embeddings=40,
    )  # fmt: skip
    routes = {"route_names": ["a", "b"], "ticket_task": "labels", "seed": 0, "private_parameters": ["*.q*.bias"]}
    for model, inputs in (
        (RTLModelForAudioClassification.from_backbone(wavlm, **routes), {"input_values": torch.randn(3, 400)}),
        (RTLModelForMaskedLM.from_backbone(longformer, **routes), {"input_ids": torch.randint(5, 50, (2, 8))}),
    ):
        fill_masks(model)
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_("layers.1" in name or "layer.1" in name)
        with mode():
            for route in (1, UNION):
                ticket = model.eval().extract_ticket(route)
                assert torch.equal(model(**inputs, route_ids=route).logits, ticket(**inputs).logits)
        ticket(**inputs).logits.sum().backward()  # a ticket extracted in inference mode can be trained, too


def test_routes_differ(zoo):
    """Routes give different results, so that the other tests compare something."""
    for kind in KINDS:
        model, masks, inputs = zoo(kind)
        outputs = [model.eval()(**inputs, route_ids=route).logits for route in (0, 1, 2, UNION)]
        outputs.append(model.backbone(**inputs).logits)
        for index, one in enumerate(outputs):
            assert not any(torch.allclose(one, other) for other in outputs[index + 1 :]), kind


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_gradient_checkpointing(zoo, kind):
    model, masks, inputs = zoo(kind, torch.float32)
    for route in (0, 2):
        results = []
        for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            if checkpointing is not None:
                model.gradient_checkpointing_enable(checkpointing)
            assert model.masker.tree.is_checkpointing() == (checkpointing is not None)
            other = copy.deepcopy(model)
            other.train()
            calls: Counter = Counter()
            for name, module in other.backbone.named_modules():
                module.register_forward_hook(lambda *_, n=name, c=calls: c.update([n]))
            with other.route_context(route):
                loss = other(**inputs).loss
                once = calls.copy()
                loss.backward()
            assert (calls != once) == (checkpointing is not None)  # layers ran again in backward
            statistics = {} if other.norm_statistics is None else other.norm_statistics.state_dict()
            results.append((loss, read_gradients(other), statistics))
            model.gradient_checkpointing_disable()
        assert not model.masker.tree.is_checkpointing()
        for loss, gradients, statistics in results[1:]:
            # A plain T5 runs without a cache under checkpointing, and differs in the last bit too.
            equal = partial(torch.allclose, rtol=1e-4, atol=1e-7) if kind == "t5" else torch.equal
            assert equal(loss, results[0][0])
            for name, gradient in results[0][1].items():
                found = gradients[name]
                assert found is None if gradient is None else equal(found, gradient), name
            for name, rows in results[0][2].items():
                assert torch.equal(statistics[name], rows), name


def test_checkpointing_needs_the_context(zoo, tiny_membership_model):
    model, masks, inputs = zoo("vit")
    model.train()
    model.gradient_checkpointing_enable()
    for routes in (0, [0, 1, 1, 0]):
        with pytest.raises(RuntimeError, match="with model.route_context"):
            model(**inputs, route_ids=routes)
        with torch.no_grad():
            model(**inputs, route_ids=routes)
    with pytest.raises(RuntimeError, match="with model.route_context"):
        model.with_route(1)(**inputs)
    model.eval()
    model(**inputs, route_ids=[0, 1, 1, 0]).loss.backward()
    model.gradient_checkpointing_disable()
    model.train()(**inputs, route_ids=0).loss.backward()

    tiny_membership_model.train()
    tiny_membership_model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="route_context"):
        tiny_membership_model(torch.randn(2, 3, 32, 32))


# Infinities


def test_an_infinite_pruned_weight_counts_as_zero(zoo):
    for kind in ("resnet", "bert"):
        model, masks, inputs = zoo(kind)
        expected, gradients = naive_gradients(model, masks[1], inputs, 1)
        with torch.no_grad():
            for parameter, mask in zip(model.masker.weights, masks[1], strict=True):
                parameter[~mask] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=parameter.dtype)[
                    torch.arange(int((~mask).sum())) % 3
                ]
        output = model(**inputs, route_ids=1)
        output.loss.backward()
        close(output.logits, expected.logits)
        assert_gradients_close(model, gradients, [masks[1]])
        for position, (parameter, mask) in enumerate(zip(model.masker.weights, masks[1], strict=True)):
            assert not torch.isfinite(parameter[~mask]).any(), position  # the weight itself is unchanged
        model.eval()
        assert torch.equal(model.extract_ticket(1)(**inputs).logits, model(**inputs, route_ids=1).logits)


def test_an_infinite_gradient_of_a_pruned_weight_is_zero(zoo):
    model, masks, inputs = zoo("attention")
    head = model.backbone.head.weight
    mask = masks[1][model.mask_bank.weight_names.index("head.weight")]
    logits = model(**inputs, route_ids=1).logits
    logits.backward(torch.full_like(logits, torch.inf))
    assert not torch.isfinite(head.grad[mask]).any()
    assert (head.grad[~mask] == 0).all() and not torch.signbit(head.grad[~mask]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_masking_is_where_to_the_bit(dtype):
    weight = torch.randn(40, 5).to(dtype)
    weight[0] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 65504.0])
    mask = torch.rand(40, 5) < 0.5
    bits = unpack_as_integers(pack(mask), mask.shape, dtype)
    leaf = weight.clone().requires_grad_()
    (masked,) = MaskWeights.apply([bits], [torch.empty_like(weight)], lambda: None, leaf)
    expected = torch.where(mask, weight, torch.zeros_like(weight))
    assert torch.equal(masked.view(bits.dtype), expected.view(bits.dtype))
    upstream = weight.flip(0)
    masked.backward(upstream.clone())
    expected = torch.where(mask, upstream, torch.zeros_like(weight))
    assert torch.equal(leaf.grad.view(bits.dtype), expected.view(bits.dtype))


def test_gradients_that_share_memory():
    """The weights of a sum share one gradient tensor; a mask must not change it for the other weight."""
    masks = [torch.rand(5, 3) < 0.5 for _ in range(3)]
    bits = [unpack_as_integers(pack(mask), mask.shape, torch.float32) for mask in masks]
    leaves = [torch.randn(5, 3, requires_grad=True) for _ in range(3)]
    a, b, c = MaskWeights.apply(bits, [torch.empty(5, 3) for _ in masks], lambda: None, *leaves)
    upstream = torch.randn(5, 3)
    (a + (b + c)).backward(upstream)
    for leaf, mask in zip(leaves, masks, strict=True):
        assert torch.equal(leaf.grad, upstream * mask)


def test_gradients_that_are_views_or_strided():
    masks = [torch.rand(5, 3) < 0.5 for _ in range(4)]
    bits = [unpack_as_integers(pack(mask), mask.shape, torch.float32) for mask in masks]
    leaves = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
    a, b, c, d = MaskWeights.apply(bits, [torch.empty(5, 3) for _ in masks], lambda: None, *leaves)
    x = torch.randn(10, 3)
    (torch.cat([a, b]) * x).sum().backward(retain_graph=True)
    (c.t() * x[:3, :].repeat(1, 2)[:, :5]).sum().backward()
    (d.sum() * 2).backward()
    for leaf, mask, gradient in zip(
        leaves, masks, (x[:5], x[5:], x[:3, :].repeat(1, 2)[:, :5].t(), torch.full((5, 3), 2.0)), strict=True
    ):
        assert torch.equal(leaf.grad, gradient * mask)


# Putting everything back


def test_everything_is_back_after_an_exception(zoo, tiny_membership_model, monkeypatch):
    model, masks, inputs = zoo("resnet")
    parameters, buffers = list(model.parameters()), dict(model.named_buffers())
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Stop(Exception):
        pass

    for route in (0, UNION):
        with pytest.raises(Stop), model.route_context(route):
            assert model.backbone.timm_model.conv1[0].weight is not parameters[0]
            raise Stop
        assert_nothing_is_left(model, parameters, buffers)
    bad = {"pixel_values": torch.randn(BATCH, 2, 32, 32, dtype=torch.float64)}  # wrong: two channels instead of three
    for routes in (1, [0, 1, 1, 0], UNION):
        with pytest.raises(RuntimeError):
            model(**bad, route_ids=routes)
        assert_nothing_is_left(model, parameters, buffers)
    with pytest.raises(RuntimeError):
        model.with_route(2)(**bad)
    assert_nothing_is_left(model, parameters, buffers)

    def fail(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(model.masker, "masks", fail)
        with pytest.raises(Stop), model.route_context(0):
            pass
    assert_nothing_is_left(model, parameters, buffers)
    with monkeypatch.context() as patch:
        patch.setattr(NormStatistics, "row", fail)
        with pytest.raises(Stop), model.route_context(0):
            pass
    assert_nothing_is_left(model, parameters, buffers)
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    # It works as before.
    close(model.eval()(**inputs, route_ids=1).logits, naive_ticket(model, masks[1], 1).eval()(**inputs).logits)

    parameters, buffers = list(tiny_membership_model.parameters()), dict(tiny_membership_model.named_buffers())
    with pytest.raises(RuntimeError):
        tiny_membership_model(torch.randn(2, 1, 32, 32))
    assert_nothing_is_left(tiny_membership_model, parameters, buffers)


def test_within_a_context_the_parameters_stay_registered(zoo):
    model, masks, _ = zoo("bert")
    parameters, buffers = list(model.parameters()), dict(model.named_buffers())
    with model.route_context(0):
        assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
        embedding = model.backbone.bert.embeddings.word_embeddings.weight
        assert embedding is model.backbone.cls.predictions.decoder.weight
        assert torch.equal(embedding == 0, ~masks[0][0] | (parameters[0] == 0))
    assert_nothing_is_left(model, parameters, buffers)
