"""Statistics of normalisation layers, with a row for every route."""

import copy

import pytest
import timm
import torch

from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.norm_statistics import NormStatistics, tracked_buffers
from tests.modeling.naive import close, naive_ticket, unite


def copy_statistics(model):
    return {name: rows.clone() for name, rows in model.norm_statistics.state_dict().items()}


def test_training_a_route_moves_its_row_once(zoo):
    model, masks, inputs = zoo("resnet", torch.float32)
    model.train()
    own = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    names = [name for name, _ in model.norm_statistics.named_buffers()]
    for route in (1, 0, UNION):
        before = copy_statistics(model)
        ticket = naive_ticket(model, unite(masks) if route == UNION else masks[route], route)
        with torch.no_grad() if route == UNION else torch.enable_grad():
            with model.route_context(route):
                model(**inputs)
                model(**inputs)
            ticket(**inputs)
            ticket(**inputs)
        expected = [
            getattr(norm, name)
            for norm in ticket.modules()
            if getattr(norm, "running_mean", None) is not None
            for name in ("running_mean", "running_var", "num_batches_tracked")
        ]
        after = copy_statistics(model)
        for name, buffer in zip(names, expected, strict=True):
            torch.testing.assert_close(after[name][route], buffer, rtol=1e-6, atol=1e-7)
            assert not torch.equal(after[name][route], before[name][route])
            others = [row for row in range(4) if row != route % 4]
            assert torch.equal(after[name][others], before[name][others])
    counts = [rows for rows in copy_statistics(model).values() if not rows.is_floating_point()]
    assert counts and all(rows.tolist() == [2, 2, 0, 2] for rows in counts)
    assert all(torch.equal(buffer, own[name]) for name, buffer in model.backbone.named_buffers())


def test_evaluation_moves_no_statistics(zoo):
    model, _, inputs = zoo("resnet")
    model.eval()
    before = copy_statistics(model)
    model(**inputs, route_ids=[0, 1, UNION, 1]).loss.backward()
    with model.route_context(2):
        model(**inputs)
    assert all(torch.equal(rows, before[name]) for name, rows in copy_statistics(model).items())


def test_evaluation_uses_the_row_of_its_route(zoo):
    model, masks, inputs = zoo("resnet")
    model.eval()
    for rows in model.norm_statistics.buffers():
        if rows.is_floating_point():
            rows.copy_(torch.rand_like(rows) + 0.5)
    for route, mask in ((0, masks[0]), (2, masks[2]), (UNION, unite(masks))):
        close(model(**inputs, route_ids=route).logits, naive_ticket(model, mask, route)(**inputs).logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm_statistics", ["per_route", "shared"])
def test_statistics_move_once_under_gradient_checkpointing(zoo, norm_statistics, reentrant):
    model, _, inputs = zoo("resnet", torch.float32, norm_statistics=norm_statistics)
    model.train()
    plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (plain, checkpointed):
        with one.route_context(1):  # two steps of accumulation, backward after both
            losses = [one(**inputs).loss for _ in range(2)]
            sum(losses).backward()
        with one.route_context(1):
            one(**inputs).loss.backward()
    for tensor, other in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(tensor, other)
    counts = [
        buffer.tolist()
        for name, buffer in plain.named_buffers()
        if buffer.dtype == torch.int64 and ("norm_statistics" in name) == (norm_statistics == "per_route")
    ]
    assert counts == [[0, 3, 0, 0] if norm_statistics == "per_route" else 3] * 15


def test_shared_statistics(zoo):
    model, masks, inputs = zoo("resnet", norm_statistics="shared")
    assert model.norm_statistics is None
    assert not any("norm_statistics" in name for name in model.state_dict())
    model.train()
    ticket = naive_ticket(model, masks[1])
    model(**inputs, route_ids=1)
    ticket(**inputs)
    for buffer, other in zip(model.backbone.buffers(), ticket.buffers(), strict=True):
        close(buffer, other)
    model.eval()
    close(model(**inputs, route_ids=0).logits, naive_ticket(model, masks[0])(**inputs).logits)


def test_new_statistics_repeat_the_backbones():
    backbone = timm.create_model("test_resnet", num_classes=3)
    for module, name in tracked_buffers(backbone):
        buffer = module.get_buffer(name)
        buffer.copy_(torch.rand(buffer.shape) * 10)
    statistics = NormStatistics(backbone, 2)
    sources = [module.get_buffer(name) for module, name in tracked_buffers(backbone)]
    assert list(dict(statistics.named_buffers())) == [f"s{index:04d}" for index in range(len(sources))]
    for rows, source in zip(statistics.rows, sources, strict=True):
        assert rows.shape == (3, *source.shape)
        assert all(torch.equal(row, source) for row in rows)
        rows.zero_()
    assert all(source.any() for source in sources if source.is_floating_point())  # no memory is shared
    statistics.reset(backbone)
    assert all(torch.equal(row, s) for rows, s in zip(statistics.rows, sources, strict=True) for row in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_never_cast(zoo, dtype):
    model, _, inputs = zoo("resnet", torch.float32)
    for rows in model.norm_statistics.buffers():
        if rows.is_floating_point():
            rows.copy_(torch.rand_like(rows) + 0.5)  # none of these values is exact in half precision
    before = copy_statistics(model)
    for cast in (lambda m: m.to(dtype), lambda m: {2: m.half, 8: m.double}[dtype.itemsize]()):
        other = cast(copy.deepcopy(model))
        rows = copy_statistics(other)
        assert all(torch.equal(rows[name], old) and rows[name].dtype == old.dtype for name, old in before.items())
        assert {str(rows.dtype) for rows in rows.values()} == {"torch.float32", "torch.int64"}
        assert all(buffer.dtype == other.dtype for _, buffer in other.backbone.named_buffers() if buffer.ndim)
        # Evaluation reads the statistics without changing a bit.
        other.eval()(pixel_values=inputs["pixel_values"].to(other.dtype), route_ids=[0, 1, 2, UNION])
        assert all(torch.equal(rows, before[name]) for name, rows in copy_statistics(other).items())


def test_a_model_in_half_precision_updates_its_statistics(zoo):
    model, _, inputs = zoo("resnet", torch.float32)
    full, half = copy.deepcopy(model).train(), copy.deepcopy(model).to(torch.bfloat16).train()
    x = inputs["pixel_values"].to(torch.bfloat16)
    with full.route_context(1), half.route_context(1):
        full(x.float())
        half(x)
    all_rows = [each.norm_statistics.rows for each in (full, half, model)]
    for one, other, before in zip(*all_rows, strict=True):
        assert other.dtype == before.dtype and not torch.equal(other[1], before[1])
        assert torch.equal(other[[0, 2, 3]], before[[0, 2, 3]])
        torch.testing.assert_close(other[1], one[1], rtol=0.1, atol=0.02)
