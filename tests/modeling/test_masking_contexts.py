"""Graphs, cached masks, threads and contexts, which last longer than a call."""

import copy
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_rtl import RTLModelForImageClassification
from hf_rtl.modeling.masking import UNION
from tests.modeling.naive import assert_gradients_close, close, naive_gradients, naive_ticket, only, unite


# Graphs


@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_two_routes_before_one_backward(zoo, kind):
    model, masks, inputs = zoo(kind)
    model.train()
    first, second = only(inputs, [0, 1]), only(inputs, [2, 3])
    _, one = naive_gradients(model, masks[0], first, 0)
    _, two = naive_gradients(model, masks[2], second, 2)
    (model(**first, route_ids=0).loss + model(**second, route_ids=2).loss).backward()
    expected = {name: None if gradient is None else gradient + two[name] for name, gradient in one.items()}
    assert_gradients_close(model, expected, [masks[0], masks[2]])
    assert model.routes_since_update == {0, 2}


@pytest.mark.parametrize("overwrite", ["context", "same route", "no_grad", "inference_mode"])
def test_a_backward_after_its_weights_were_overwritten_raises(zoo, overwrite):
    model, _, inputs = zoo("resnet")
    with model.route_context(0):
        loss = model(**inputs).loss
    other = 0 if overwrite == "same route" else 1
    if overwrite == "no_grad":
        with torch.no_grad():
            model(**inputs, route_ids=other)
    elif overwrite == "inference_mode":
        with torch.inference_mode():
            model(**inputs, route_ids=other)
    else:
        with model.route_context(other):
            pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_first_use_in_inference_mode_does_not_spoil_training(zoo):
    model, masks, inputs = zoo("resnet")
    with torch.inference_mode():
        inferred = model.eval()(**inputs, route_ids=[0, 1, 1, 0]).logits
    close(inferred.clone(), model(**inputs, route_ids=[0, 1, 1, 0]).logits.detach())
    _, gradients = naive_gradients(model.train(), masks[1], inputs, 1)
    with model.route_context(1):
        model(**inputs).loss.backward()
    assert_gradients_close(model, gradients, [masks[1]])


def test_the_step_after_a_weight_update_sees_the_new_weights(zoo):
    model, masks, inputs = zoo("vit")
    for _ in range(2):
        model.zero_grad()
        expected, gradients = naive_gradients(model, masks[1], inputs, 1)
        with model.route_context(1):
            output = model(**inputs)
            output.loss.backward()
        close(output.logits, expected.logits)
        assert_gradients_close(model, gradients, [masks[1]])
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


# Cached masks


def test_changed_masks_are_seen(zoo):
    model, masks, inputs = zoo("vit")
    model.eval()

    def assert_fresh(route, mask):
        close(model(**inputs, route_ids=route).logits, naive_ticket(model, mask)(**inputs).logits)
        close(model(**inputs, route_ids=UNION).logits, naive_ticket(model, model.mask_bank.union())(**inputs).logits)

    assert_fresh(0, masks[0])
    model.mask_bank[0] = masks[1]
    assert_fresh(0, masks[1])
    with torch.inference_mode():
        model.mask_bank[0] = masks[2]
    assert_fresh(0, masks[2])
    model.mask_bank.load_state_dict({name: rows.flip(0) for name, rows in model.mask_bank.state_dict().items()})
    assert_fresh(1, masks[1])
    assert_fresh(2, masks[2])
    # Twice, since the second new buffer may get the memory of the first old one.
    before = [model.mask_bank[route] for route in range(3)]
    model.mask_bank.reorder([1, 2, 0])
    model.mask_bank.reorder([1, 2, 0])
    assert_fresh(0, before[2])
    assert_fresh(1, before[0])


@pytest.mark.parametrize("cache_bytes", [0, 1, 2**28])
def test_the_cache_keeps_to_its_bound(zoo, cache_bytes):
    model, masks, inputs = zoo("vit", torch.float32)
    model.masker.cache_bytes = cache_bytes
    one = 4 * model.mask_bank.num_weights
    model.eval()
    for route in (0, 1, 2, 1, UNION):
        model(**inputs, route_ids=route)
        held = model.status()["mask_cache"]["bytes"]
        assert held == one if cache_bytes < one else one <= held <= 4 * one
        cached = model.masker.masks([route])
        expected = unite(masks) if route == UNION else masks[route]
        assert all(torch.equal(mask != 0, kept) for mask, kept in zip(cached, expected, strict=True))
    assert held == (one if cache_bytes < one else 4 * one)
    model.masker.cache_bytes = 2 * one
    model.masker.forget()
    assert model.masker.cached_bytes() == 0
    for route in (0, 1, 0, 2):  # 1 is the least recently used, and goes
        model.masker.masks([route])
    assert model.masker.cached_bytes() == 2 * one
    kept = model.masker.masks([0])
    assert model.masker.masks([0]) is kept
    assert set(model.masker.cache) == {(0,), (2,)}


def test_update_masks_are_the_union_of_the_routes_since_the_last_step(zoo):
    model, masks, inputs = zoo("vit")
    model.train()
    with pytest.raises(RuntimeError, match="since the last optimizer step"):
        model.update_masks()
    for routes in ([0], [2, 0], [UNION]):
        for route in routes:
            with model.route_context(route):
                model(**inputs).loss.backward()
        assert model.routes_since_update == set(routes)
        expected = unite(masks if UNION in routes else [masks[route] for route in routes])
        for found, kept in zip(model.update_masks(), expected, strict=True):
            assert torch.equal(found, -kept.to(torch.int64))
        model.zero_grad()
        assert not model.routes_since_update
    with torch.no_grad():
        model(**inputs, route_ids=1)
    assert not model.routes_since_update


# Threads


def in_thread(function):
    """Runs `function` in a thread; returns the thread, and a list for its result or exception."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_another_thread_waits_in_evaluation(zoo):
    model, masks, inputs = zoo("vit")
    model.eval()
    expected = model(**inputs, route_ids=1).logits
    with model.route_context(0):
        inside = model(**inputs).logits
        thread, results = in_thread(lambda: model(**inputs, route_ids=1).logits)
        mixed_thread, mixed_results = in_thread(lambda: model(**inputs, route_ids=[1, 1, 1, 1]).logits)
        time.sleep(0.1)
        assert not results and not mixed_results and thread.is_alive()
        assert torch.equal(model(**inputs).logits, inside)
        assert model.status()["active_route"] == 0
    thread.join(10)
    mixed_thread.join(10)
    assert torch.equal(results[0], expected)
    close(mixed_results[0], expected)
    assert not model.active.held


def test_another_thread_raises_in_training(zoo):
    model, _, inputs = zoo("vit")
    model.train()
    with model.route_context(0):
        thread, results = in_thread(lambda: model(**inputs, route_ids=1))
        thread.join(10)
        assert isinstance(results[0], RuntimeError) and "another thread is training route 0" in str(results[0])
        for action in (model.state_dict, lambda: copy.deepcopy(model), lambda: model.to(torch.float32)):
            thread, results = in_thread(action)
            thread.join(10)
            assert isinstance(results[0], RuntimeError) and "inside a route_context" in str(results[0])
    model(**inputs, route_ids=1)


def test_many_threads_get_their_own_tickets(zoo):
    model, _, inputs = zoo("vit")
    model.eval()
    expected = [model(**inputs, route_ids=route).logits for route in range(3)]

    def ask(route):
        return [model(**inputs, route_ids=route).logits for _ in range(5)]

    jobs = [in_thread(partial(ask, route)) for route in [0, 1, 2] * 2]
    for index, (thread, results) in enumerate(jobs):
        thread.join(30)
        assert all(torch.equal(logits, expected[index % 3]) for logits in results[0])


# Actions that are refused inside a context


def test_actions_inside_a_context_raise(zoo, tmp_path):
    model, _, inputs = zoo("resnet")
    state = model.state_dict()
    with model.route_context(1):
        for action in (
            model.state_dict,
            lambda: model.load_state_dict(state),
            lambda: model.save_pretrained(tmp_path / "new"),
            lambda: model.to(torch.float32),
            model.half,
            model.cpu,
            lambda: copy.deepcopy(model),
            lambda: model.extract_ticket(1),
        ):
            with pytest.raises(RuntimeError, match="inside a route_context"):
                action()
    assert not (tmp_path / "new").exists()
    assert model.dtype == torch.float64
    copy.deepcopy(model).to(torch.float32).load_state_dict(model.state_dict())


def test_a_copy_is_independent(zoo):
    for kind in ("resnet", "bert"):
        model, masks, inputs = zoo(kind)
        model.eval()
        expected = model(**inputs, route_ids=1).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(**inputs, route_ids=1).logits, expected)
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.norm_statistics.rows]:
                tensor.zero_()
        other.mask_bank[1] = [~mask for mask in masks[1]]
        with other.route_context(0):
            assert torch.equal(model(**inputs, route_ids=1).logits, expected)
        with model.route_context(0):
            other(**inputs, route_ids=1)


def test_wrapping_a_model_of_the_caller(fill_masks, tiny_vit_config):
    """The caller's model is used without a copy, and is unchanged outside contexts."""
    backbone = AutoModelForImageClassification.from_config(tiny_vit_config).eval()
    x = torch.randn(2, 3, 8, 8)
    before = backbone(x).logits
    model = RTLModelForImageClassification.from_backbone(backbone, route_names=["x"], ticket_task="labels")
    assert model.backbone is backbone and torch.equal(backbone(x).logits, before)
    assert torch.equal(model.eval()(x, route_ids=0).logits, before)  # new masks keep everything
    fill_masks(model)
    assert not torch.equal(model(x, route_ids=0).logits, before)
    assert torch.equal(backbone(x).logits, before)
    assert isinstance(backbone.classifier, nn.Linear)
