"""Private parameters, against a copy of the backbone with the route's row."""

import copy

import pytest
import torch

from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.private_parameters import select_private
from tests.modeling.naive import close, naive_gradients, naive_ticket, only, unite, without_labels


PATTERNS = {
    "resnet": ["*bn*", "*.fc.*"],
    "vit": ["*layernorm*", "*.bias", "classifier.*", "*position_embeddings"],
    "bert": ["*LayerNorm*", "*.dense.bias"],
    "t5": ["*layer_norm*", "*relative_attention_bias*"],
    "gpt2": ["*ln_?.*", "*c_fc.bias", "*wpe*"],
    "attention": ["*bias", "embedding.weight"],
}


@pytest.fixture
def private_zoo(zoo):
    """As `zoo`, with a different row for each route."""

    def build(kind, dtype=torch.float64, **kwargs):
        model, masks, inputs = zoo(kind, dtype, private_parameters=PATTERNS[kind], **kwargs)
        with torch.no_grad():
            for rows in model.private_parameters.rows:
                rows.add_(0.1 * torch.randn_like(rows))
        return model, masks, inputs

    return build


def with_row(model, route):
    """A copy without private parameters, whose backbone has the row of `route`."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, rows in zip(model.private_parameters.names, model.private_parameters.rows, strict=True):
            own = other.backbone.get_parameter(name)
            own.copy_(rows.mean(0) if route == UNION else rows[route]).requires_grad_()
    return other


@pytest.mark.parametrize("route", [0, 2, UNION])
@pytest.mark.parametrize("kind", PATTERNS)
def test_forward_and_gradients_of_a_route(private_zoo, kind, route):
    model, masks, inputs = private_zoo(kind)
    model.train()
    mask = unite(masks) if route == UNION else masks[route]
    expected, gradients = naive_gradients(with_row(model, route), mask, inputs, route)
    own = [parameter.detach().clone() for parameter in model.private_parameters.own(model.backbone)]
    with model.route_context(route):
        output = model(**inputs)
        output.loss.backward()
    close(output.logits, expected.logits)
    private = dict(zip(model.private_parameters.names, model.private_parameters.rows, strict=True))
    assert len(private) > 3
    for name, rows in private.items():
        for other in range(3):
            if route in (other, UNION):
                close(rows.grad[other], gradients[name] / (3 if route == UNION else 1), 1e-9)
            else:
                assert not rows.grad[other].any(), name
    for name, parameter in model.backbone.named_parameters():
        if name in private:
            assert parameter.grad is None and not parameter.requires_grad
        elif gradients[name] is not None:
            close(parameter.grad, gradients[name], 1e-9)
    assert all(torch.equal(*pair) for pair in zip(own, model.private_parameters.own(model.backbone), strict=True))
    assert model.routes_since_update == {route}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["resnet", "vit", "attention"])
def test_mixed_batches(private_zoo, kind, training):
    model, masks, inputs = private_zoo(kind)
    model.train(training)
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    route_ids = [0, 2, 0, 2, UNION, UNION, 0, 2]
    output = model(**inputs, route_ids=route_ids)
    output.loss.backward()
    expected = [torch.zeros_like(rows) for rows in model.private_parameters.rows]
    for route in (0, 2, UNION):
        positions = [index for index, other in enumerate(route_ids) if other == route]
        mask = unite(masks) if route == UNION else masks[route]
        reference = with_row(model, route).train(training)
        ticket = naive_ticket(reference, mask, route)
        alone = ticket(**only(inputs, positions))
        close(output.logits[positions], alone.logits, 1e-10)
        (alone.loss * len(positions) / 8).backward()
        for rows, name in zip(expected, model.private_parameters.names, strict=True):
            gradient = ticket.get_parameter(name).grad
            if route == UNION:
                rows += gradient / 3
            else:
                rows[route] += gradient
    for rows, gradient in zip(model.private_parameters.rows, expected, strict=True):
        close(rows.grad, gradient, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["vit", "bert", "attention"])
def test_gradients_are_the_same_with_gradient_checkpointing(private_zoo, kind, reentrant):
    model, _, inputs = private_zoo(kind)
    model.train()
    found = []
    for checkpointing in (False, True):
        other = copy.deepcopy(model)
        if checkpointing:
            other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with other.route_context(1):
            other(**inputs).loss.backward()
        found.append([rows.grad for rows in other.private_parameters.rows])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed) and plain[1].any()


def test_a_context_leaves_nothing_behind(private_zoo):
    model, _, inputs = private_zoo("vit")
    inputs = without_labels(inputs)
    before = model.backbone(**inputs).logits
    with pytest.raises(ZeroDivisionError), model.route_context(1):
        assert "weight" in model.backbone.classifier.__dict__
        1 / 0  # noqa: B018
    assert not any(set(module.__dict__) & set(module._parameters) for module in model.backbone.modules())
    assert torch.equal(model.backbone(**inputs).logits, before)  # the dense network uses the backbone's rows


def test_a_first_use_in_inference_mode_does_not_spoil_training(private_zoo):
    model, _, inputs = private_zoo("vit")
    with torch.inference_mode():
        inferred = model.eval()(**inputs, route_ids=1).logits
    with model.train().route_context(1):
        output = model(**inputs)
        output.loss.backward()
    close(inferred.clone(), output.logits.detach())


def test_equal_rows_have_themselves_as_their_mean(zoo):
    """So at θ0 the union of full tickets equals the backbone to the bit."""
    model, masks, inputs = zoo("vit", torch.float32, private_parameters=PATTERNS["vit"], route_names=list("abcdefg"))
    rows, own = model.private_parameters.row(UNION), model.private_parameters.own(model.backbone)
    assert all(torch.equal(*pair) for pair in zip(rows, own, strict=True))
    naive = [rows.mean(0) for rows in model.private_parameters.rows]
    assert not all(torch.equal(*pair) for pair in zip(naive, own, strict=True))  # The plain mean would round.


def test_two_routes_before_one_backward(private_zoo):
    model, masks, inputs = private_zoo("vit")
    model.train()
    first, second = only(inputs, [0, 1]), only(inputs, [2, 3])
    gradients = [
        naive_gradients(with_row(model, route), masks[route], part, route)[1]
        for route, part in ((0, first), (2, second))
    ]
    (model(**first, route_ids=0).loss + model(**second, route_ids=2).loss).backward()
    for name, rows in zip(model.private_parameters.names, model.private_parameters.rows, strict=True):
        close(rows.grad[0], gradients[0][name], 1e-9)
        close(rows.grad[2], gradients[1][name], 1e-9)
        assert not rows.grad[1].any()
    assert model.routes_since_update == {0, 2}


# The choice of private parameters


@pytest.mark.parametrize(
    ("kind", "patterns", "message"),
    [
        (
            "resnet",
            ["*nonsense*"],
            r"pattern '\*nonsense\*', which matches no parameter of TimmWrapper.*'timm_model.conv1.1.weight'",
        ),
        ("resnet", ["*bn1*", "*"], r"pattern '\*', which matches 'timm_model.conv1.0.weight': masks cover"),
        ("bert", ["*embeddings.LayerNorm.weight", "cls.predictions.bias"], "matches 'cls.predictions.bias': .* tied"),
        ("vit", "*.bias", "must be a list of patterns"),
        ("vit", [3], "must be a list of patterns"),
    ],
)
def test_parameters_that_cannot_be_private_are_refused(zoo, kind, patterns, message):
    with pytest.raises(ValueError, match="`private_parameters`.*" + message):
        zoo(kind, private_parameters=patterns)


def test_names_are_in_the_order_of_the_backbone(zoo):
    model, _, _ = zoo("vit")
    names = [name for name, _ in model.backbone.named_parameters()]
    prunable = model.mask_bank.weight_names
    chosen = select_private(model.backbone, ["classifier.*", "*layernorm*", "*.layernorm.bias"], prunable)
    expected = [name for name in names if "layernorm" in name or name.startswith("classifier.")]
    assert chosen == expected and len(chosen) > 8
    assert select_private(model.backbone, [], prunable) == [] and model.private_parameters.names == []
