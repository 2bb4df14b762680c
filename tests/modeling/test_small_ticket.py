"""Small tickets: the same outputs from smaller tensors, which the configuration says where it can."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from hf_rtl import RTLModelForSequenceClassification
from hf_rtl.modeling import modeling_rtl, small_ticket
from hf_rtl.modeling.small_ticket import remove_units
from hf_rtl.modeling.standalone import TensorOutputs
from tests.modeling.small_backbones import BACKBONES, build, units_found_once, zero_units


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(small_ticket, modeling_rtl):
        yield


# What the configuration says of half of the units.
SAID = {
    "bert": {"intermediate_size": 12},
    "roberta": {"intermediate_size": 12},
    "albert": {"intermediate_size": 12},
    "gpt2": {"n_inner": 32},
    "llama": {"intermediate_size": 12},
    "phi3": {"intermediate_size": 12},
    "t5": {"d_ff": 12},
    "bart": {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12},
    "vit": {"intermediate_size": 12},
    "timm vit": {"model_args": {"depth": 2, "embed_dim": 32, "mlp_ratio": 1.5}},
    "bottlenecks": {"model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "base_width": 32}},
}


def halved(name):
    """A network in which every other unit of each layer is zero, all but those of the head; inputs; layers."""
    network, inputs = build(name)
    network = network.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    layers = [layer for layer in small_ticket.find_units(network, inputs) if "pooler" not in layer.name]
    for layer in layers:
        zero_units(network, layer, torch.arange(layer.num_units) % 2 == 1)
    return network, inputs, layers


def outputs(network, inputs):
    with torch.no_grad():
        return list(TensorOutputs(network)(**inputs))


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_the_configuration_says_the_smaller_shapes(name, tmp_path):
    network, inputs, layers = halved(name)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    for key, value in SAID[name].items():
        said = getattr(small.config, key)
        assert said == value or value.items() <= said.items()
    unchanged = {key: value for key, value in network.config.to_dict().items() if key not in SAID[name]}
    assert {key: small.config.to_dict()[key] for key in unchanged} == unchanged
    assert_close(outputs(small, inputs), expected, 1e-12)
    small.save_pretrained(tmp_path)
    loaded = BACKBONES[name][1].from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(tensor, small.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert_close(outputs(loaded, inputs), expected, 1e-12)
    assert_close(outputs(small.float(), {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}),
                 [one.float() for one in expected], 1e-5)  # fmt: skip
    # Exactly the units that are gone are missing, with their biases; the network itself has not changed.
    for layer in layers if name != "bottlenecks" else [layer for layer in layers if "layer" in layer.name]:
        for (place, dim), indices in layer.places.items():
            tensor = dict(small.named_parameters()).get(place, dict(small.named_buffers()).get(place))
            assert tensor.shape[dim] == indices.shape[1] * layer.num_units // 2, place
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert "hf_rtl" not in json.dumps(small.config.to_dict(), default=str)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic blocks", "convnext", "depthwise"])
def test_what_no_configuration_says_is_not_saved(name, tmp_path):
    network, inputs, _ = halved(name)
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in network.parameters())
    assert_close(outputs(small, inputs), expected, 1e-12)
    with pytest.raises(ValueError, match="its shapes do not follow its configuration"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_no_configuration_says_is_exported():
    network, inputs, _ = halved("depthwise")
    file = io.BytesIO()
    torch.export.save(
        torch.export.export(TensorOutputs(remove_units(network, inputs)), (), inputs, strict=False), file
    )
    file.seek(0)
    again = torch.export.load(file).module()(**inputs)
    assert_close(again, outputs(network, inputs), 1e-12)


def test_layers_of_one_size_keep_as_many_units_as_the_largest_needs():
    network, inputs = build("bert")
    first, second, _ = small_ticket.find_units(network, inputs)
    zero_units(network, first, torch.arange(24) < 10)
    zero_units(network, second, torch.arange(24) >= 20)
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    assert small.config.intermediate_size == 20
    assert_close(outputs(small, inputs), expected, 1e-6)
    # Six removed units of the first layer are kept, the first ones.
    bias = network.get_parameter("bert.encoder.layer.0.intermediate.dense.bias")
    kept = [*range(6), *range(10, 24)]
    assert torch.equal(small.get_parameter("bert.encoder.layer.0.intermediate.dense.bias"), bias[kept])


@pytest.mark.slow
def test_a_configuration_that_would_take_units_in_use_is_not_chosen():
    """timm's `base_width` is one for all stages; here the first can lose half of its channels, the others none."""
    network, inputs = build("bottlenecks")
    for layer in small_ticket.find_units(network, inputs):
        if "layer1" in layer.name:
            zero_units(network, layer, torch.arange(layer.num_units) % 2 == 1)
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    assert small.config.to_dict() == network.config.to_dict()
    assert_close(outputs(small, inputs), expected, 1e-6)
    widths = [getattr(small.timm_model, f"layer{stage}")[0].conv1.out_channels for stage in (1, 2, 3, 4)]
    assert widths == [4, 16, 24, 32]
    with pytest.raises(ValueError, match="its shapes do not follow its configuration"):
        small.save_pretrained("anywhere")


def test_a_network_that_uses_all_units_stays_whole():
    network, inputs = build("bert")
    small = remove_units(network, inputs)
    assert small is not network and small.config.to_dict() == network.config.to_dict()
    assert all(torch.equal(*pair) for pair in zip(small.parameters(), network.parameters(), strict=True))


def test_all_units_of_a_layer_gone_leaves_one():
    network, inputs = build("llama")
    for layer in small_ticket.find_units(network, inputs):
        zero_units(network, layer, torch.ones(24, dtype=torch.bool))
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    assert small.config.intermediate_size == 1
    assert_close(outputs(small, inputs), expected, 1e-6)


def test_a_ticket_of_a_model_is_extracted_small(tmp_path):
    network, inputs = build("bert")
    model = RTLModelForSequenceClassification.from_backbone(
        copy.deepcopy(network), route_names=["day", "night"], ticket_task="labels"
    ).eval()
    layers = small_ticket.find_units(network, inputs)[:2]
    for route in range(2):
        masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[route], strict=True))
        for layer in layers:
            for (name, dim), units in layer.places.items():
                if name in masks:
                    masks[name].index_fill_(dim, units[torch.arange(24) % 3 == route].flatten(), False)
        model.mask_bank[route] = list(masks.values())
    for route in ("day", "night"):
        small = model.extract_ticket(route, small=True)
        assert small.config.intermediate_size == 16
        assert_close(outputs(small, inputs)[:1], [model(**inputs, route_ids=route).logits.detach()], 1e-6)
        small.save_pretrained(tmp_path / route)
        assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path / route), type(small))


@pytest.mark.parametrize("name", ["bert", "bottlenecks"])
def test_shifts_of_size_ten_are_no_part_of_units_that_are_gone(name):
    """The biases of removed units, and the shifts of their batch norms, would be seen if anything read them."""
    network, inputs, _ = halved(name)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(10)
    assert_close(outputs(remove_units(network, inputs), inputs), outputs(network, inputs), 1e-12)


def test_a_small_ticket_is_quantised():
    network, inputs, _ = halved("bert")
    small = remove_units(network, inputs).float()
    expected = outputs(small, inputs)
    quantize_(small, Int8WeightOnlyConfig())
    assert_close(outputs(small, inputs), expected, 0.05)


class Branches(PreTrainedModel):
    """A convolution that reads two others, one beside the other."""

    config_class, main_input_name = PreTrainedConfig, "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.both = nn.Conv2d(10, 2, 1)
        self.post_init()

    def forward(self, pixel_values):
        return self.both(torch.cat([self.one(pixel_values).relu(), self.two(pixel_values).tanh()], 1))


@pytest.mark.slow
def test_units_of_two_layers_that_one_reads_side_by_side():
    network = Branches(PreTrainedConfig()).double().eval()
    inputs = {"pixel_values": torch.randn(2, 3, 4, 4, dtype=torch.float64)}
    for layer in small_ticket.find_units(network, inputs):
        zero_units(network, layer, torch.arange(layer.num_units) % 2 == 1)
    expected = outputs(network, inputs)
    small = remove_units(network, inputs)
    assert (small.one.out_channels, small.two.out_channels, small.both.in_channels) == (3, 2, 5)
    assert_close(outputs(small, inputs), expected, 1e-12)
