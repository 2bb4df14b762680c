"""A search leaves everything else as it was, also if a batch cannot be read."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_rtl import RTLModelForCausalLM, RTLModelForImageClassification, find_tickets
from hf_rtl.modeling import modeling_rtl
from tests.modeling.small_backbones import build, units_found_once


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


def samples_of(name):
    generator = np.random.default_rng(0)
    if name == "bottlenecks":
        rows = [{"pixel_values": generator.normal(size=(3, 32, 32)).tolist()} for _ in range(12)]
    else:
        rows = [{"input_ids": generator.integers(3, 40, 6).tolist()} for _ in range(12)]
    return Dataset.from_list([{**row, "place": "ab"[index % 2]} for index, row in enumerate(rows)])


class Recorded:
    """What a search must not change, recorded before it."""

    def __init__(self, model):
        self.model = model
        self.tensors = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.backbone.named_parameters()}
        self.trained = [parameter.requires_grad for parameter in model.backbone.parameters()]
        self.flags = [module.training for module in model.modules()]
        self.hooks = [len(hooks) for hooks in self._hooks()]
        self.generators = self._generators()

    def _hooks(self):
        for module in self.model.modules():
            yield from (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)

    def _generators(self):
        return [random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()]

    def check(self, training):
        backbone = self.model.backbone
        assert all(torch.equal(self.tensors[name], tensor) for name, tensor in backbone.state_dict().items())
        assert all(torch.equal(self.gradients[name], p.grad) for name, p in backbone.named_parameters())
        assert self.trained == [parameter.requires_grad for parameter in backbone.parameters()]
        assert self.hooks == [len(hooks) for hooks in self._hooks()]
        assert self.generators == self._generators()
        assert self.model.active.route is None
        if training:
            assert self.flags == [module.training for module in self.model.modules()]


@pytest.mark.parametrize(
    ("name", "granularity", "of_model"),
    [
        ("bottlenecks", "channel", RTLModelForImageClassification),
        ("bottlenecks", "weight", RTLModelForImageClassification),
        ("llama", "neuron", RTLModelForCausalLM),
    ],
)
def test_a_search_changes_masks_alone(name, granularity, of_model):
    network, _ = build(name)
    model = of_model.from_backbone(network, route_names=["a", "b"], ticket_task="labels").train()
    if name == "bottlenecks":
        network.timm_model.layer1.eval()
        network.timm_model.layer2[0].drop_path = nn.Dropout(0.5)  # it would draw while training
    for index, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5)
        parameter.requires_grad_(index % 3 > 0)
    options = {"route_column": "place", "granularity": granularity, "round_to": 2, "num_batches": 2, "batch_size": 3}
    data, recorded, masks = samples_of(name), Recorded(model), model.mask_bank.fingerprint()
    read = 0

    def breaks_off(samples):
        nonlocal read
        read += 1
        if read == 4:
            raise OSError("the second batch of the second route")
        return {key: torch.tensor([sample[key] for sample in samples]) for key in samples[0] if key != "place"}

    with pytest.raises(OSError, match="the second batch of the second route"):
        find_tickets(model, data, sparsity=0.5, data_collator=breaks_off, **options)
    recorded.check(training=True)
    assert model.mask_bank.fingerprint() == masks
    assert find_tickets(model, data, sparsity=0.5, data_collator=breaks_off, **options) is model
    recorded.check(training=False)
    assert model.mask_bank.fingerprint() != masks and not any(module.training for module in model.modules())


def test_a_forward_that_fails_leaves_a_network_as_it_was():
    network, _ = build("llama")
    model = RTLModelForCausalLM.from_backbone(network, route_names=["a", "b"], ticket_task="labels").train()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    recorded, before = Recorded(model), copy.deepcopy(model.config.to_dict())
    data = samples_of("llama").map(
        lambda row, index: {"input_ids": [99] * 6} if index == 11 else row, with_indices=True
    )
    with pytest.raises(IndexError):
        find_tickets(model, data, sparsity=0.5, route_column="place", batch_size=2)
    recorded.check(training=True)
    assert model.config.to_dict() == before
