"""The routes of a call, and membership tickets without given routes."""

import pytest
import torch
from torch.nn import functional as F

from hf_rtl import RTLModel, RTLModelForSequenceClassification
from hf_rtl.modeling.masking import UNION
from tests.modeling.naive import assert_gradients_close, assert_nothing_is_left, close, naive_ticket


# Membership


def membership_bce(logits, homes):
    """Mean one-vs-rest binary cross entropy, term by term."""
    terms = []
    for sample, home in enumerate(homes.tolist()):
        for route in range(logits.shape[1]):
            value = logits[sample, route]
            terms.append(-F.logsigmoid(value) if route == home else -F.logsigmoid(-value))
    return sum(terms) / len(terms)


def test_without_routes_all_membership_tickets_score(tiny_membership_model):
    model = tiny_membership_model.double().eval()
    x, homes = torch.randn(5, 3, 32, 32).double(), torch.tensor([2, 0, 0, 1, 2])
    output = model(x, labels=homes)
    assert output.logits.shape == (5, 3)
    for route in range(3):
        assert torch.equal(output.logits[:, route : route + 1], model(x, route_ids=route).logits)
        ticket = naive_ticket(model, model.mask_bank[route], route)
        close(output.logits[:, route : route + 1], ticket(x).logits)
    close(output.loss, membership_bce(output.logits, homes))
    assert model(x).loss is None and torch.equal(model(x).logits, output.logits)
    assert model(x, labels=homes.int()).loss == output.loss
    assert set(output.keys()) == {"loss", "logits"}


def test_gradients_when_all_tickets_score(tiny_membership_model):
    model = tiny_membership_model.double().eval()  # uses running statistics, so that only weights have gradients
    x, homes = torch.randn(4, 3, 32, 32).double(), torch.tensor([2, 0, 0, 1])
    model(x, labels=homes).loss.backward()
    masks = [model.mask_bank[route] for route in range(3)]
    tickets = [naive_ticket(model, mask, route) for route, mask in enumerate(masks)]
    membership_bce(torch.cat([ticket(x).logits for ticket in tickets], 1), homes).backward()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.backbone.named_parameters()}
    for ticket, mask in zip(tickets, masks, strict=True):
        kept = dict(zip(model.mask_bank.weight_names, mask, strict=True))
        for name, parameter in ticket.named_parameters():
            expected[name] += parameter.grad * kept.get(name, 1)
    assert_gradients_close(model, expected, masks)
    assert model.routes_since_update == {0, 1, 2}


def test_membership_of_a_given_route(tiny_membership_model, tiny_bert_config, fill_masks):
    text = RTLModelForSequenceClassification.from_backbone(
        tiny_bert_config, route_names=["p", "q", "r"], ticket_task="membership", seed=0
    )
    fill_masks(text)
    for model, x in (
        (tiny_membership_model, torch.randn(4, 3, 32, 32).double()),
        (text, torch.randint(0, 40, (4, 6))),
    ):
        model.double().eval()
        labels = torch.tensor([1, 0, 0, 1])
        output = model(x, labels=labels, route_ids=1)
        assert output.logits.shape == (4, 1)
        naive = sum(
            -F.logsigmoid(value) if label else -F.logsigmoid(-value)
            for value, label in zip(output.logits[:, 0], labels, strict=True)
        )
        close(output.loss, naive / 4)
        for same in (labels[:, None], labels.bool(), labels.double(), labels.float()[:, None]):
            assert torch.equal(model(x, labels=same, route_ids=1).loss, output.loss)
        with model.route_context(1):
            assert torch.equal(model(x, labels=labels).loss, output.loss)
        mixed = model(x, labels=labels, route_ids=[0, 1, 2, 1])
        assert mixed.logits.shape == (4, 1)
        close(mixed.logits, torch.stack([model(x, route_ids=r).logits[i] for i, r in enumerate([0, 1, 2, 1])]))
        close(mixed.loss, F.binary_cross_entropy_with_logits(mixed.logits[:, 0], labels.double()))
        assert model(x).logits.shape == (4, 3)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0.0, 1.0]), r"home routes, integers \[batch\], got torch.float32"),
        (torch.tensor([[0], [1]]), r"home routes, integers \[batch\], got torch.int64 \(2, 1\)"),
        (torch.tensor([0, 3]), r"home routes, allowed are 0 to 2, got \[0, 3\]"),
        (torch.tensor([0, -1]), r"home routes, allowed are 0 to 2, got \[0, -1\]"),
    ],
)
def test_bad_home_routes(tiny_membership_model, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_membership_model.eval()(torch.randn(2, 3, 32, 32), labels=labels)


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.zeros(2, 1, 1), torch.tensor([0, 2]), torch.tensor(1)])
def test_bad_membership_labels(tiny_membership_model, labels):
    with pytest.raises(ValueError, match="0 or 1 per sample"):
        tiny_membership_model.eval()(torch.randn(2, 3, 32, 32), labels=labels, route_ids=0)


# The argument `route_ids`


@pytest.mark.parametrize(
    "route_ids, error, message",
    [
        ("nobody", ValueError, "unknown route 'nobody'; the routes are 'x', 'y', 'z'"),
        (["x", "nobody", "y", "z"], ValueError, "unknown route 'nobody'; the routes are 'x', 'y', 'z'"),
        (3, ValueError, "route 3 is out of range; allowed are 0 to 2"),
        (-2, ValueError, "route -2 is out of range"),
        ([0, 1, 2, 3], ValueError, "route 3 is out of range"),
        (torch.tensor([0, 1, 2, -2]), ValueError, "route -2 is out of range"),
        (torch.tensor(3), ValueError, "route 3 is out of range"),
        ([0, 1], ValueError, "2 entries for a batch of 4"),
        (["x"] * 5, ValueError, "5 entries for a batch of 4"),
        (torch.tensor([0]), ValueError, "1 entries for a batch of 4"),
        ([], ValueError, "`route_ids` is empty"),
        (torch.tensor([], dtype=torch.long), ValueError, "`route_ids` is empty"),
        (torch.tensor([0.0, 1, 2, 0]), TypeError, r"must be integers \[batch\], got torch.float32"),
        (torch.tensor(1.0), TypeError, "must be integers"),
        (torch.tensor([True, False, True, False]), TypeError, "must be integers.*torch.bool"),
        (torch.tensor([[0, 1, 2, 0]]), TypeError, r"must be integers \[batch\], got torch.int64 \(1, 4\)"),
        (True, TypeError, "a route is a name or an index, not True"),
        ([True, False, True, False], TypeError, "a route is a name or an index, not True"),
        (1.0, TypeError, "not a float"),
        (-1.0, TypeError, "not a float"),
        ([0, 1, None, 2], TypeError, "not a NoneType"),
        ({"x": 1}, TypeError, "not a dict"),
    ],
)
def test_bad_route_ids(zoo, route_ids, error, message):
    model, _, inputs = zoo("vit")
    parameters, buffers = list(model.parameters()), dict(model.named_buffers())
    with pytest.raises(error, match=message):
        model.eval()(**inputs, route_ids=route_ids)
    assert_nothing_is_left(model, parameters, buffers)


def test_missing_route_ids(zoo):
    model, _, inputs = zoo("vit")
    with pytest.raises(ValueError, match="`route_ids` is missing.*'x', 'y', 'z'"):
        model(**inputs)


def test_route_ids_against_the_active_context(zoo):
    model, _, inputs = zoo("vit")
    model.eval()
    with model.route_context("y"):
        expected = model(**inputs).logits
        for same in (1, "y", torch.tensor(1), [1, "y", 1, 1], torch.tensor([1, 1, 1, 1])):
            assert torch.equal(model(**inputs, route_ids=same).logits, expected)
        assert torch.equal(model.with_route(1)(**inputs).logits, expected)
        for other in (0, "x", UNION, [1, 1, 1, 0], torch.tensor([0, 0, 0, 0])):
            with pytest.raises(ValueError, match=r"inside the active route_context\(1\)"):
                model(**inputs, route_ids=other)
        with pytest.raises(ValueError, match=r"inside the active route_context\(1\)"):
            model.with_route(0)(**inputs)
        with pytest.raises(ValueError, match="4 entries|5 entries"):
            model(**inputs, route_ids=[1] * 5)
        for nested in (0, 1):
            with pytest.raises(RuntimeError, match=rf"route_context\({nested}\) inside the active route_context\(1\)"):
                with model.route_context(nested):
                    pass
        assert torch.equal(model(**inputs).logits, expected)  # nothing has changed
    with pytest.raises(ValueError, match="unknown route"), model.route_context("nobody"):
        pass


def test_positional_arguments(zoo):
    model, _, inputs = zoo("vit")
    x = inputs["pixel_values"]
    assert torch.equal(model(x, route_ids=1).logits, model(pixel_values=x, route_ids=1).logits)
    assert torch.equal(model(x, inputs["labels"], 1).loss, model(**inputs, route_ids=1).loss)
    base = RTLModel.from_backbone(model.backbone.config, route_names=["x"], ticket_task="labels").eval()
    assert torch.equal(base(x, route_ids=0)[0], base(pixel_values=x, route_ids=0).last_hidden_state)
    with pytest.raises(TypeError, match="one positional argument, `pixel_values`, got 2"):
        base(x, None, route_ids=0)


@pytest.mark.filterwarnings("ignore")
def test_exporting_a_routed_model_names_the_ticket(zoo):
    model, _, inputs = zoo("vit")
    view, pixels = model.with_route(1), (inputs["pixel_values"],)
    expected = view(*pixels).logits
    for export in (lambda: torch.export.export(view, pixels, strict=False), lambda: torch.jit.trace(view, pixels)):
        with pytest.raises(RuntimeError, match=r"cannot be exported .* `model\.extract_ticket\(route\)`"):
            export()
        assert torch.equal(view(*pixels).logits, expected)
