"""
The naive reference of a routed forward: a copy of the backbone in float64, whose weights are multiplied by the mask.
Gradients are multiplied by it afterwards, for one route and one group at a time.
"""

import copy

import torch


KINDS = ("resnet", "vit", "bert", "t5", "gpt2", "attention")
BATCH = 4


def padding(ids):
    """An attention mask in which every sample has a different number of tokens."""
    return (torch.arange(ids.shape[1]) < torch.tensor([[7], [5], [6], [3]])).long()


def some_labels(ids):
    """Labels for 7, 1, 4 and 2 tokens of the samples, at positions that a shift tells apart."""
    labels = ids.clone()
    labels[1, 1:] = -100
    labels[2, :3] = -100
    labels[3, 2:] = -100
    return labels


def only(inputs, positions):
    """The samples at `positions`."""
    return {name: value[positions] for name, value in inputs.items()}


def without_labels(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


def unite(masks):
    return [torch.stack(layer).any(0) for layer in zip(*masks, strict=True)]


def naive_ticket(model, mask, route=None):
    """A copy of the backbone with masked weights and the route's statistics."""
    ticket = copy.deepcopy(model.backbone)
    parameters = dict(ticket.named_parameters())
    with torch.no_grad():
        for name, kept in zip(model.mask_bank.weight_names, mask, strict=True):
            parameters[name].mul_(kept)
        if model.norm_statistics is not None and route is not None:
            norms = [m for m in ticket.modules() if getattr(m, "running_mean", None) is not None]
            rows = iter(model.norm_statistics.state_dict().values())
            for norm in norms:
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    getattr(norm, name).copy_(next(rows)[route])
    return ticket


def naive_gradients(model, mask, inputs, route=None, scale=1.0):
    """Loss, logits and gradients; those of prunable weights are multiplied by the mask afterwards."""
    ticket = naive_ticket(model, mask, route)
    output = ticket(**inputs)
    (output.loss * scale).backward()
    gradients = {name: parameter.grad for name, parameter in ticket.named_parameters()}
    for name, kept in zip(model.mask_bank.weight_names, mask, strict=True):
        gradients[name] = gradients[name] * kept
    return output, gradients


def read_gradients(model):
    return {name: parameter.grad for name, parameter in model.backbone.named_parameters()}


def assert_gradients_close(model, expected, masks, rtol=1e-9, atol=1e-12):
    found = read_gradients(model)
    assert found.keys() == expected.keys() and any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name, kept in zip(model.mask_bank.weight_names, unite(masks), strict=True):
        assert not found[name][~kept].any(), name


def assert_nothing_is_left(model, parameters, buffers):
    """Checks that all parameters and buffers are in place, nothing hides them, and no context is active."""
    assert not model.active.held and model.active.route is None
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name], name
    for module in model.backbone.modules():
        assert not set(module.__dict__) & set(module._parameters)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
