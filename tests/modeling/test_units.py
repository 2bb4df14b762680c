"""Units are found from the graph of a network: which rows and columns belong together."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from hf_rtl.modeling.units import find_units
from tests.modeling.small_backbones import build, find_units_once


def mlp(prefix, up, down, *, biases=(), transposed=False):
    """The places of feed-forward neurons: rows of `up`, columns of `down`."""
    first, second = (1, 0) if transposed else (0, 1)
    places = {(f"{prefix}.{name}.weight", first): 1 for name in up}
    return {**places, **{(f"{prefix}.{name}.bias", 0): 1 for name in biases}, (f"{prefix}.{down}.weight", second): 1}


def conv(conv_1, norm, conv_2):
    names = ("weight", "bias", "running_mean", "running_var")
    return {(f"{conv_1}.weight", 0): 1, **{(f"{norm}.{name}", 0): 1 for name in names}, (f"{conv_2}.weight", 1): 1}


BLOCK = "timm_model.layer2.0"
BERT, ALBERT = "bert.encoder.layer.1", "albert.encoder.albert_layer_groups.0.albert_layers.0"
PHI3 = "model.layers.1.mlp"
UP = "intermediate.dense"
# Backbone -> kind, number of units and places of one of its layers, with the indices per unit; number of layers.
EXPECTED = {
    "bert": ("neuron", 24, mlp(BERT, [UP], "output.dense", biases=[UP]), 3),
    "albert": ("neuron", 24, mlp(ALBERT, ["ffn"], "ffn_output", biases=["ffn"]), 1),
    "gpt2": ("neuron", 64, mlp("transformer.h.1.mlp", ["c_fc"], "c_proj", biases=["c_fc"], transposed=True), 2),
    "llama": ("neuron", 24, mlp("model.layers.1.mlp", ["gate_proj", "up_proj"], "down_proj"), 2),
    "phi3": ("neuron", 24, {(f"{PHI3}.gate_up_proj.weight", 0): 2, (f"{PHI3}.down_proj.weight", 1): 1}, 2),
    "t5": ("neuron", 24, mlp("decoder.block.0.layer.2.DenseReluDense", ["wi_0", "wi_1"], "wo"), 2),
    "timm vit": ("neuron", 96, mlp("timm_model.blocks.1.mlp", ["fc1"], "fc2", biases=["fc1"]), 2),
    "convnext": ("neuron", 128, mlp("timm_model.stages.1.blocks.1.mlp", ["fc1"], "fc2", biases=["fc1"]), 5),
    # The stem, and two in each of four blocks. Sums of blocks are no units.
    "bottlenecks": ("channel", 16, conv(f"{BLOCK}.conv1", f"{BLOCK}.bn1", f"{BLOCK}.conv2"), 9),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_units_have_all_their_places_and_no_others(name):
    network, inputs = build(name)
    kind, num_units, places, num_layers = EXPECTED[name]
    layers = find_units_once(network, inputs)
    found = [layer for layer in layers if layer.places.keys() == places.keys()]
    assert len(layers) == num_layers and len(found) == 1
    (layer,) = found
    assert (layer.kind, layer.num_units) == (kind, num_units)
    assert {place: units.shape for place, units in layer.places.items()} == {
        place: (num_units, width) for place, width in places.items()
    }
    assert layer.readers == [list(places)[-1]]
    assert layer.name == next(iter(places))[0].removesuffix(".weight")


def test_a_network_stays_as_it_is():
    network = nn.Sequential(OrderedDict(input=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), last=nn.Conv2d(4, 2, 1)))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    (layer,) = find_units(network, {"input": torch.randn(2, 3, 5, 5)})
    assert layer.name == "input" and layer.readers == [("last.weight", 1)]
    assert all(module.training for module in network.modules())
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_halves_of_a_fused_projection_belong_together():
    network, inputs = build("phi3")
    layer = find_units_once(network, inputs)[0]
    units = layer.places["model.layers.0.mlp.gate_up_proj.weight", 0]
    assert units.tolist() == [[unit, unit + 24] for unit in range(24)]


@pytest.mark.parametrize("name", ["bert", "phi3", "t5", "depthwise", "bottlenecks"])
def test_without_its_matrices_a_unit_does_nothing(name):
    """Whatever a unit computes: its readers have zeros for it, so its bias or batch norm is not seen."""
    network, inputs = build(name)
    layers = find_units_once(network, inputs)
    removed = [torch.arange(layer.num_units) % 3 == 1 for layer in layers]
    for layer, units in zip(layers, removed, strict=True):
        with torch.no_grad():
            for reader, dim in layer.readers:
                network.get_parameter(reader).index_fill_(dim, layer.places[reader, dim][units].flatten(), 0)
    with torch.no_grad():
        expected = network(**inputs).logits
        for layer, units in zip(layers, removed, strict=True):
            parameters = dict(network.named_parameters())
            for (place, dim), indices in layer.places.items():
                if place in parameters and (place, dim) not in layer.readers:
                    shape = parameters[place].index_select(dim, indices[units].flatten()).shape
                    parameters[place].index_copy_(dim, indices[units].flatten(), torch.randn(shape))
        assert torch.allclose(network(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_known_inputs_needs_some():
    network, _ = build("bert")
    network.main_input_name = "input_values"
    with pytest.raises(ValueError, match="`example_inputs` cannot be made for BertFor"):
        find_units(network)


def test_a_network_that_cannot_be_traced_is_named():
    network, inputs = build("bert")
    with pytest.raises(ValueError, match="cannot trace BertFor.* with input_id, so its units are not known"):
        find_units(network, {"input_id": inputs["input_ids"]})
    forward = network.forward

    def decides_by_data(**given):
        return forward(**given) if given["input_ids"].sum() > 0 else None

    network.forward = decides_by_data
    with pytest.raises(ValueError, match="Give other `example_inputs`, or use `granularity='weight'`"):
        find_units(network, inputs)
