"""The refit solves a least-squares problem: compared with NumPy on the stacked system."""

import copy

import numpy as np
import pytest
import torch

from hf_rtl import RTLModelForCausalLM
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.refit import refit, solve
from tests.modeling.small_backbones import build, find_units_once, units_found_once


def stacked(rows, weight, kept, ridge, centred):
    """The ridge problem as one least-squares problem: rows of the data, then a row for each kept input."""
    rows, weight = rows.numpy(), weight.numpy()
    if centred:
        rows = rows - rows.mean(0)
    removed = np.setdiff1d(np.arange(rows.shape[1]), kept)
    penalty = np.sqrt(ridge * np.mean(np.sum(rows[:, kept] ** 2, axis=0)))
    system = np.vstack([rows[:, kept], penalty * np.eye(len(kept))])
    targets = np.vstack([rows[:, removed] @ weight[:, removed].T, np.zeros((len(kept), len(weight)))])
    return np.linalg.lstsq(system, targets, rcond=None)[0].T


@pytest.mark.parametrize("centred", [True, False])
def test_the_solution_is_that_of_the_stacked_system(centred):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 1
    weight, kept = torch.randn(3, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 3, 6])
    products, total = rows[:, kept].T @ rows, rows.sum(0)
    solved, offset = solve(weight, kept, products, total, 50, ridge=0.01, centred=centred)
    change = stacked(rows, weight, kept.numpy(), 0.01, centred)
    assert np.allclose(solved[:, kept].numpy(), weight[:, kept].numpy() + change, rtol=1e-9)
    assert not solved[:, [1, 4, 5, 7]].any()
    if centred:
        assert torch.allclose((rows @ solved.T + offset).mean(0), (rows @ weight.T).mean(0), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "albert"])
def test_layers_are_solved_in_order_on_what_the_layers_before_them_give(name):
    network, inputs = build(name)
    network = network.double()
    batches = [{"input_ids": torch.randint(3, 40, (4, 6))} for _ in range(5)]
    layers = [layer for layer in find_units_once(network, inputs) if "pooler" not in layer.name]
    kept = [torch.arange(layer.num_units) % 3 > 0 for layer in layers]
    expected = {}
    reference, _ = build(name)
    reference = reference.double()
    for layer, units in zip(layers, kept, strict=True):
        ((reader, dim),) = layer.readers
        module, rows = reference.get_submodule(reader.removesuffix(".weight")), []
        hook = module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                reference(**batch)
            hook.remove()
            inputs, weight = torch.cat(rows), module.weight if dim == 1 else module.weight.T
            chosen, bias = units.nonzero().flatten(), getattr(module, "bias", None)
            change = torch.from_numpy(stacked(inputs, weight.detach(), chosen.numpy(), 0.01, bias is not None))
            solved = torch.zeros_like(weight)
            solved[:, chosen] = weight[:, chosen] + change
            if bias is not None:
                bias.add_((inputs @ (weight - solved).T).mean(0))
            weight.copy_(solved)
        expected[reader] = module.weight.detach()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    refit(network, layers, kept, lambda: batches)
    for key, tensor in network.state_dict().items():
        if key in expected:
            assert torch.allclose(tensor, expected[key], rtol=1e-7, atol=1e-10) and not torch.equal(
                tensor, before[key]
            )
        elif key.removesuffix(".bias") + ".weight" in expected:
            assert torch.allclose(tensor, reference.state_dict()[key], rtol=1e-7, atol=1e-10)
        else:
            assert torch.equal(tensor, before[key])


@pytest.mark.slow
def test_what_a_convolution_or_several_layers_read_is_left_alone():
    network, inputs = build("bottlenecks")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    layers = find_units_once(network, inputs)
    refit(network, layers, [torch.arange(layer.num_units) % 2 > 0 for layer in layers], lambda: [inputs])
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.slow
def test_a_refit_needs_batches():
    network, inputs = build("llama")
    layers = find_units_once(network, inputs)
    with pytest.raises(ValueError, match="`refit` needs at least one batch"):
        refit(network, layers, [torch.arange(24) > 3] * 2, list)


def test_a_refitted_ticket_is_nearer_to_the_network_without_masks():
    network, inputs = build("llama")
    model = RTLModelForCausalLM.from_backbone(network, route_names=["a", "b"], ticket_task="labels").eval()
    masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[0], strict=True))
    for layer in find_units_once(network, inputs):
        for (name, dim), units in layer.places.items():
            masks[name].index_fill_(dim, units[::2].flatten(), False)
    model.mask_bank["b"] = list(masks.values())
    rows = [{"input_ids": torch.randint(3, 40, (6,)), "labels": torch.zeros(6)} for _ in range(40)]
    with units_found_once(modeling_rtl):
        plain, fitted = (model.extract_ticket("b", small=True, refit=data) for data in (None, rows))
    seen = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        dense = network(input_ids=seen).logits
        errors = [float((ticket(input_ids=seen).logits - dense).square().mean()) for ticket in (plain, fitted)]
        assert torch.equal(model.extract_ticket("a")(input_ids=seen).logits, dense)
    assert fitted.config.intermediate_size == 12 and errors[1] < 0.95 * errors[0]


def test_sums_of_single_batches_as_processes_exchange_them_give_the_same_to_the_bit():
    batches = [{"input_ids": torch.randint(3, 40, (4, 6))} for _ in range(5)]
    network, _ = build("llama")
    layers = find_units_once(network, batches[0])
    kept = [torch.arange(layer.num_units) % 2 > 0 for layer in layers]
    solved = []
    for gather in (None, lambda sums: sums):
        solved.append(copy.deepcopy(network))
        refit(solved[-1], layers, kept, lambda: batches, gather=gather)
    for name, tensor in solved[0].state_dict().items():
        assert torch.equal(tensor, solved[1].state_dict()[name])
    name = layers[0].readers[0][0]
    assert not torch.equal(solved[0].get_parameter(name), network.get_parameter(name))
