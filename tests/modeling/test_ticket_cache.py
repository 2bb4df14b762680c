"""Tickets kept for evaluation: equal to extracted tickets to the bit, whatever happens between two calls."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from hf_rtl import MaskedAdamW, RTLModelForImageClassification
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.ticket_cache import TicketCache
from tests.modeling.naive import without_labels
from tests.modeling.small_backbones import units_found_once
from tests.modeling.test_unit_coding import make_model


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


def assert_as_extracted(model, inputs, routes=(0, 1)):
    """Twice per route, so that the second call finds the ticket."""
    small = model.config.compute == "small"
    for route in routes:
        ticket = model.extract_ticket(route, small=small).eval()
        with torch.no_grad():
            expected = ticket(**inputs).logits
            for _ in range(2):
                assert torch.equal(model(**inputs, route_ids=route).logits, expected)


@pytest.fixture
def kept(zoo, fill_masks):
    """`kept(kind, compute)`: a model in evaluation mode whose tickets 0 and 1 have answered, and its inputs."""

    def build(kind, compute="full"):
        if compute == "small":
            model, inputs, _ = make_model({"resnet": "bottlenecks", "bert": "bert"}[kind])
        elif kind == "resnet":
            model, _, inputs = zoo(kind, torch.float32, private_parameters=["*bn*.bias"])
        else:
            model, _, inputs = zoo(kind, torch.float32)
        model.eval().config.compute = compute
        inputs = without_labels(inputs)
        assert_as_extracted(model, inputs, [0] if compute == "small" else [0, 1])
        return model, inputs

    return build


def first_norm(model):
    return next(module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm))


def prunable_layer(model):
    return model.masker.places[0][0][0]


@torch.no_grad()
def edit_weight(model):
    model.masker.weights[0].mul_(2)


@torch.no_grad()
def edit_one_element(model):
    model.masker.weights[-1].view(-1)[5] += 1


def edit_data(model):
    model.masker.weights[0].data.mul_(2)


def set_data(model):
    model.masker.weights[0].data = model.masker.weights[0].data * 2


@torch.inference_mode()
def edit_in_inference_mode(model):
    model.masker.weights[0].add_(1)


def edit_through_numpy(model):
    model.masker.weights[0].detach().numpy()[...] += 1


@torch.no_grad()
def edit_bias(model):
    first_norm(model).bias.add_(1)


@torch.no_grad()
def edit_private_rows(model):
    for rows in model.private_parameters.rows:
        rows.add_(torch.arange(len(rows)).view(-1, *[1] * (rows.ndim - 1)))


@torch.no_grad()
def edit_statistics(model):
    for rows in [] if model.norm_statistics is None else model.norm_statistics.rows:
        rows.add_(1)


def replace_statistics(model):
    if model.norm_statistics is not None and model.norm_statistics.rows:
        model.norm_statistics.s0001 = model.norm_statistics.s0001 * 2


def step(model):
    optimizer = MaskedAdamW(model.parameters(), model, lr=0.1)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.routes_since_update.add(0)
    optimizer.step()
    model.eval()


def step_of_torch(model):
    for parameter in model.backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.backbone.parameters(), lr=0.1).step()


def other_state(model):
    return {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}


def load(model):
    model.load_state_dict(other_state(model))


def assign(model):
    model.load_state_dict(other_state(model), assign=True)


def move(model):
    model.to(torch.float64).to(torch.float32)


def move_a_layer(model):
    prunable_layer(model).half().float()


def replace_parameter(model):
    layer = prunable_layer(model)
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def replace_module(model):
    name = model.mask_bank.weight_names[-1].removesuffix(".weight")
    layer = copy.deepcopy(model.backbone.get_submodule(name))
    nn.init.normal_(layer.weight)
    model.backbone.set_submodule(name, layer)


def freeze(model):
    model.requires_grad_(False)


def edit_mask(model):
    model.mask_bank[0] = [~mask for mask in model.mask_bank[0]]


def edit_packed(model):
    for rows in model.mask_bank.packed:
        rows[0] = rows[1]


@torch.inference_mode()
def edit_mask_in_inference_mode(model):
    model.mask_bank[0] = model.mask_bank[1]


def load_masks(model):
    model.mask_bank.load_state_dict({name: rows.flip(0) for name, rows in model.mask_bank.state_dict().items()})


def drop(model):
    model.drop_route(0)


def add(model):
    row = () if model.norm_statistics is None else [row + 1 for row in model.norm_statistics.row(0)]
    model.append_ticket("new", model.mask_bank[1], statistics=row)
    model.drop_route(0)
    model.drop_route(0)


def make_private(model):
    model.make_private(
        [next(name for name, own in model.backbone.named_parameters() if own is first_norm(model).bias)]
    )
    edit_private_rows(model)


def edit_what_is_in_place(model):
    with torch.no_grad(), model.route_context(0):
        layer, attribute = model.masker.places[0][0]
        getattr(layer, attribute).add_(1)


def train(model):
    model.train()
    with model.route_context(1):
        pass
    model.eval()


CHANGES = [
    *(edit_weight, edit_one_element, edit_data, set_data, edit_in_inference_mode, edit_through_numpy, edit_bias),
    *(edit_private_rows, edit_statistics, replace_statistics, step, step_of_torch, load, assign, move, move_a_layer),
    *(replace_parameter, replace_module, freeze, edit_mask, edit_packed, edit_mask_in_inference_mode, load_masks),
    *(drop, add, make_private, edit_what_is_in_place, train),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_after_any_change_tickets_are_those_of_now(kept, kind, change):
    model, inputs = kept(kind)
    change(model)
    assert_as_extracted(model, inputs, range(min(2, model.num_routes)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("resnet", [edit_statistics, move_a_layer, edit_bias]),
        ("bert", [edit_data, edit_bias, load, replace_module, edit_mask, drop]),
    ],
)
def test_after_any_change_small_tickets_are_those_of_now(kept, kind, changes):
    model, inputs = kept(kind, "small")
    for change in changes:
        change(model)
        assert_as_extracted(model, inputs, [0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("what", ["model", "backbone"])
def test_tickets_have_the_type_of_the_model(zoo, dtype, what):
    model, _, inputs = zoo("resnet", torch.float32)
    inputs = without_labels(inputs)
    assert_as_extracted(model.eval(), inputs)
    (model if what == "model" else model.backbone).to(dtype)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    assert_as_extracted(model, inputs)
    edit_statistics(model)
    assert_as_extracted(model, inputs)
    # Norms alone, as for steps in mixed precision.
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    if dtype == torch.bfloat16:
        assert_as_extracted(model, inputs)


def test_a_weight_that_is_tied_later_is_masked_in_both_places(zoo, fill_masks):
    model, _, inputs = zoo("vit", torch.float32)
    names = [name.removesuffix(".weight") for name in model.mask_bank.weight_names]
    pairs = [(a, b) for a in names for b in names if a < b]
    shapes = {name: model.backbone.get_submodule(name).weight.shape for name in names}
    first, second = next((a, b) for a, b in pairs if shapes[a] == shapes[b])
    model = RTLModelForImageClassification.from_backbone(
        model.backbone, route_names=["x", "y"], ticket_task="labels", prune_exclude=[f"{second}.weight"]
    ).eval()
    masks = fill_masks(model)
    inputs = without_labels(inputs)
    assert_as_extracted(model, inputs)
    one, other = (model.backbone.get_submodule(name) for name in (first, second))
    other.weight = one.weight
    assert_as_extracted(model, inputs)
    position = model.mask_bank.weight_names.index(f"{first}.weight")
    with model.route_context(0), torch.no_grad():
        expected = torch.where(masks[0][position], one._parameters["weight"], 0)
        assert torch.equal(other.weight, expected) and torch.equal(one.weight, expected)


def test_what_stands_in_for_a_parameter_requires_a_gradient_as_it_does(kept):
    """By that torch chooses kernels."""
    model, _ = kept("bert")
    layer, attribute = model.masker.places[0][0]
    for flag in (True, False):
        layer._parameters[attribute].requires_grad_(flag)
        with torch.no_grad(), model.route_context(0):
            assert getattr(layer, attribute).requires_grad == flag


def test_views_have_the_tickets_of_their_model(kept):
    model, inputs = kept("resnet")
    view = model.with_route("y")
    assert view.tickets is model.tickets
    with torch.no_grad():
        before = view(**inputs).logits
        assert torch.equal(before, model(**inputs, route_ids="y").logits)
        edit_weight(model)
        assert not torch.equal(view(**inputs).logits, before)
        assert torch.equal(view(**inputs).logits, model.extract_ticket("y").eval()(**inputs).logits)


def test_the_union_is_a_ticket_too(kept):
    model, inputs = kept("resnet")
    assert_as_extracted(model, inputs, [UNION])
    edit_mask(model)
    assert_as_extracted(model, inputs, [UNION])


def test_threads_get_their_own_routes(kept):
    model, inputs = kept("resnet")
    with torch.no_grad():
        expected = [model(**inputs, route_ids=route).logits for route in range(3)]
    wrong = []

    def answer(route):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(**inputs, route_ids=route).logits, expected[route]):
                    wrong.append(route)

    threads = [threading.Thread(target=answer, args=[route]) for route in (0, 1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_no_grad_share_tickets(kept):
    model, inputs = kept("resnet")
    model.tickets.clear()
    with torch.inference_mode():
        first = model(**inputs, route_ids=0).logits.clone()
    ticket = model.tickets.tickets[0]
    with torch.no_grad():
        assert torch.equal(model(**inputs, route_ids=0).logits, first)
    assert model.tickets.tickets[0] is ticket
    assert not any(tensor.is_inference() for tensor in ticket.own)


def test_weights_made_in_inference_mode_are_never_kept(zoo, fill_masks):
    with torch.inference_mode():
        model, _, inputs = zoo("resnet", torch.float32)
        model.eval()
        inputs = without_labels(inputs)
        before = model(**inputs, route_ids=0).logits
        model.masker.weights[0].mul_(2)
        after = model(**inputs, route_ids=0).logits
        assert not torch.equal(before, after)
        assert torch.equal(after, model.extract_ticket(0).eval()(**inputs).logits)


def test_autocast_sees_the_ticket_that_answers(kept):
    """It keeps what it has cast, by tensor, until it is left."""
    model, inputs = kept("bert")
    model.tickets.clear()
    model.config.mask_cache_bytes = 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [model(**inputs, route_ids=route).logits for route in (0, 1, 0)]
    for route, logits in zip((0, 1, 0), found, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits, model.extract_ticket(route).eval()(**inputs).logits)


def test_as_many_tickets_are_kept_as_fit(kept):
    model, inputs = kept("bert")
    one = sum(weight.nbytes for weight in model.masker.weights)
    assert model.tickets.num_bytes() == 2 * one
    model.config.mask_cache_bytes = 2 * one
    assert_as_extracted(model, inputs, [0, 2])
    assert list(model.tickets.tickets) == [0, 2]  # 1 was used least recently
    model.config.mask_cache_bytes = 0
    memory = {tensor.data_ptr() for ticket in model.tickets.tickets.values() for tensor in ticket.own}
    assert_as_extracted(model, inputs, [1])
    assert list(model.tickets.tickets) == [1]
    assert {tensor.data_ptr() for tensor in model.tickets.tickets[1].own} <= memory
    assert model.status()["ticket_cache"] == {"bytes": one, "limit": 0}
    assert not model.masker.cache  # no mask is unpacked beside


def test_a_ticket_is_made_once(kept, monkeypatch):
    model, inputs = kept("resnet")
    monkeypatch.setattr(TicketCache, "_make", None)
    assert_as_extracted(model, inputs)
    with torch.no_grad():
        model(**inputs, route_ids=[0, 1, 0, 1])


def test_training_keeps_no_tickets_and_copies_start_without(kept):
    model, inputs = kept("resnet")
    assert not copy.deepcopy(model).tickets.tickets
    assert not pickle.loads(pickle.dumps(model)).tickets.tickets
    assert_as_extracted(copy.deepcopy(model), inputs)
    train(model)
    assert not model.tickets.tickets


def test_layers_in_training_mode_write_their_statistics(kept):
    model, inputs = kept("resnet")
    first_norm(model).train()
    before = [rows.clone() for rows in model.norm_statistics.rows]
    with torch.no_grad():
        model(**inputs, route_ids=1)
    changed = [
        (rows != old).view(len(rows), -1).any(1).tolist()
        for rows, old in zip(model.norm_statistics.rows, before, strict=True)
    ]
    assert changed[:3] == [[False, True, False, False]] * 3
    assert not any(map(any, changed[3:]))


@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_nothing_is_left_in_layers(kept, kind):
    model, inputs = kept(kind, "full" if kind == "resnet" else "small")
    tables = [dict(module.__dict__) for module in model.backbone.modules()]
    buffers = [dict(module._buffers) for module in model.backbone.modules()]
    hook = model.backbone.register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(**inputs, route_ids=0)
    hook.remove()
    assert [module.__dict__ for module in model.backbone.modules()] == tables
    for module, before in zip(model.backbone.modules(), buffers, strict=True):
        assert all(module._buffers[name] is before[name] for name in before)


def test_refitted_readers_are_small_too():
    model, inputs, _ = make_model("bert", refit=True)
    model.config.compute = "small"
    assert_as_extracted(model, inputs)
    edit_private_rows(model)
    assert_as_extracted(model, inputs, [1])


@pytest.mark.slow
def test_layers_compute_in_as_many_groups_as_a_small_ticket_has():
    model, inputs, _ = make_model("depthwise")
    model.config.compute = "small"
    assert_as_extracted(model, inputs, [0])


def test_small_matrices_are_what_layers_compute_with(kept):
    model, inputs = kept("bert", "small")
    widths = []
    layer = next(module for name, module in model.backbone.named_modules() if name.endswith("intermediate.dense"))
    layer.register_forward_hook(lambda module, _, output: widths.append(output.shape[-1]))
    whole = layer.out_features
    with torch.no_grad():
        small = model(**inputs, route_ids=0).logits
        model.config.compute = "full"
        torch.testing.assert_close(model(**inputs, route_ids=0).logits, small, rtol=1e-5, atol=1e-6)
    model.config.compute = "small"
    model(**inputs, route_ids=0)  # gradients are recorded
    assert widths == [whole // 2, whole, whole]


def test_an_unknown_way_to_compute_is_refused(kept):
    model, inputs = kept("bert")
    model.config.compute = "tiny"
    with torch.no_grad(), pytest.raises(ValueError, match="`compute` must be one of 'full', 'small', got 'tiny'"):
        model(**inputs, route_ids=0)
