"""Channels of small networks that never matter: exactly these are removed, and outputs stay equal."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from hf_rtl.modeling.standalone import LayerChannels, remove_dead_channels
from tests.modeling.channels import IMAGES, Function, assert_removed, assert_same_tensors, randomise


# Against brute force


def make_chain(seed, keep):
    """A chain of layers whose wide ones keep a fraction `keep` of their weights, with shifts around zero."""
    generator = torch.Generator().manual_seed(seed)
    chain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4, 5),
        nn.ReLU(),
        nn.Linear(5, 4),
    ).double()
    with torch.no_grad():
        for layer in chain:
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if name == "running_var":
                    tensor.abs_().add_(0.1)
                if tensor.ndim > 1:  # Channels with few weights often lose all of them.
                    rate = keep if tensor[0].numel() > 24 else 0.3
                    tensor.mul_(torch.rand(tensor.shape, generator=generator) < rate)
    return chain.eval()


@torch.no_grad()
def kept_by_brute_force(chain):
    """Per layer with weights: (indices kept of its inputs, of its outputs), found channel by channel."""
    values = [[None] * 3]  # Every channel before each layer: its constant, or None if it depends on the input.
    for layer in chain:
        before, after = values[-1], []
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            depthwise = getattr(layer, "groups", 1) > 1
            for out in range(len(layer.weight)):
                is_constant = True
                for position in range(1 if depthwise else layer.weight.shape[1]):
                    source = out if depthwise else position
                    read = any(weight != 0 for weight in layer.weight[out, position].flatten().tolist())
                    if read and before[source] != 0:
                        is_constant = False
                bias = 0.0 if layer.bias is None else float(layer.bias[out])
                after.append(bias if is_constant else None)
        elif isinstance(layer, nn.BatchNorm2d):
            for channel, value in enumerate(before):
                scale = float(layer.weight[channel]) / math.sqrt(float(layer.running_var[channel]) + layer.eps)
                shift = float(layer.bias[channel]) - float(layer.running_mean[channel]) * scale
                after.append(None if value is None else value * scale + shift)
        elif isinstance(layer, nn.ReLU):
            after = [None if value is None else max(value, 0.0) for value in before]
        elif isinstance(layer, nn.ReLU6):
            after = [None if value is None else min(max(value, 0.0), 6.0) for value in before]
        elif isinstance(layer, nn.Flatten):
            after = [value for value in before for _ in range(4)]
        else:
            after = list(before)
        values.append(after)

    needed = [True] * 4  # the outputs
    kept = {}
    for index in reversed(range(len(chain))):
        layer, before = chain[index], values[index]
        if isinstance(layer, nn.Flatten):
            needed = [any(needed[4 * channel : 4 * channel + 4]) for channel in range(len(needed) // 4)]
            for later in kept.values():  # The next linear layer keeps or loses all positions of a channel.
                if later[2] == "flat":
                    later[0] = [4 * channel + i for channel, needs in enumerate(needed) if needs for i in range(4)]
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        outputs = [out for out, needs in enumerate(needed) if needs]
        if getattr(layer, "groups", 1) > 1:
            kept[index] = [None, outputs, ""]  # An input channel is kept if its output is.
            continue
        needed = []
        for position in range(layer.weight.shape[1]):
            needs = False
            for out in outputs:
                if layer.weight[out, position].abs().max() > 0 and before[position] != 0:
                    needs = True
            needed.append(needs)
        inputs = [position for position, needs in enumerate(needed) if needs] if index else [0, 1, 2]
        kept[index] = [inputs, outputs, "flat" if layer.weight.shape[1] == 24 else ""]
    return kept


@pytest.mark.slow
def test_a_chain_against_brute_force():
    num_removed = 0
    for seed, keep in enumerate([0.1, 0.1, 0.05, 0.05]):
        chain = make_chain(seed, keep)
        reference = copy.deepcopy(chain)
        kept = kept_by_brute_force(chain)
        remove_dead_channels(chain, {"input": torch.randn(2, 3, 8, 8)})
        for index, (inputs, outputs, _) in kept.items():
            layer, before = chain[index], reference[index]
            # If no channel is needed, the first one stays.
            outputs = outputs or [0]
            expected = before.weight[outputs]
            if inputs is not None:
                flat = before.weight.shape[1] == 24
                expected = expected[:, inputs or ([0, 1, 2, 3] if flat else [0])]
            assert torch.equal(layer.weight, expected), (seed, index)
            assert layer.bias is None or torch.equal(layer.bias, before.bias[outputs])
            num_removed += before.weight.numel() - layer.weight.numel()
        for size in ((1, 3, 8, 8), (4, 3, 10, 14)):
            images = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(chain(images), reference(images), rtol=1e-12, atol=1e-12)
    assert num_removed > 250


# What decides


@pytest.mark.slow
def test_residual_channels_go_only_when_all_readers_agree():
    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.second(self.first(x).relu())).relu())

    for zeroed, removed in (
        ({"head": [1]}, {}),  # still read by the first layer of the branch
        ({"first": [1]}, {}),
        ({"head": [1], "first": [1]}, {"stem": ([], [1]), "first": ([1], []), "second": ([], [1]), "head": ([1], [])}),
    ):
        layers = {"stem": nn.Conv2d(3, 4, 3), "first": nn.Conv2d(4, 5, 1), "second": nn.Conv2d(5, 4, 1)}
        model = Function(forward, **layers, head=nn.Conv2d(4, 2, 3))
        with torch.no_grad():
            for name, indices in zeroed.items():
                getattr(model, name).weight[:, indices] = 0
        assert_removed(model, removed, {"input": torch.randn(1, 3, 7, 12)})


def test_what_is_added_to_a_channel_that_is_read_only_before_goes():
    """Channel 1 stays, since the exit reads it. The branch's later addition to it goes, since nothing reads it."""

    def forward(self, x):
        x = self.stem(x).relu()
        early = self.exit(x)
        return early + self.head(x + self.second(self.first(x).relu()))

    layers = {"stem": nn.Conv2d(3, 4, 3), "first": nn.Conv2d(4, 5, 1), "second": nn.Conv2d(5, 4, 1)}
    model = Function(forward, **layers, head=nn.Conv2d(4, 2, 1), exit=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.head.weight[:, 1] = 0
        model.second.weight[[0, 2, 3], 2] = 0
    assert_removed(model, {"first": ([], [2]), "second": ([2], [])})


@pytest.mark.slow
def test_a_constant_of_two_summands_must_be_zero_in_the_sum():
    def forward(self, x):
        return self.head((self.one(x) + self.two(x)).relu())

    for biases, removed in (
        ((1.0, -1.5), {"one": ([], [2]), "two": ([], [2]), "head": ([2], [])}),
        ((1.0, -0.5), {}),
    ):
        model = Function(forward, one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 3))
        with torch.no_grad():
            for layer, bias in zip((model.one, model.two), biases, strict=True):
                layer.weight[2] = 0
                layer.bias[2] = bias
        assert_removed(model, removed)


@pytest.mark.slow
def test_a_product_with_zero_is_zero_and_with_another_constant_is_not():
    def forward(self, x):
        x = self.one(x)
        return self.head(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    for bias, removed in ((0.0, {"one": ([], [1]), "gate": ([1], [1]), "head": ([1], [])}), (0.5, {})):
        model = Function(forward, one=nn.Conv2d(3, 4, 3), gate=nn.Conv2d(4, 4, 1), head=nn.Conv2d(4, 2, 3))
        with torch.no_grad():
            model.one.weight[1] = 0
            model.one.bias[1] = bias
        assert_removed(model, removed)


@pytest.mark.slow
def test_a_constant_beside_zero_padding_is_no_constant():
    """A convolution or a padded average sees less of the constant at the border, so its output is not constant."""
    for middle in (nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.AvgPool2d(3, padding=1), nn.ConstantPad2d(1, 0.7)):
        model = nn.Sequential(nn.Conv2d(3, 2, 1), middle, nn.ReLU(), nn.Conv2d(2, 2, 1))
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = 1.0
        assert_removed(model, {})
        with torch.no_grad():  # zero stays zero
            model[0].bias[1] = 0.0
            if isinstance(middle, nn.Conv2d):
                middle.bias[1] = -1.0
        gone = {} if isinstance(middle, nn.ConstantPad2d) else {"0": ([], [1]), "3": ([1], [])}
        assert_removed(model, {**gone, **({"1": ([], [1])} if isinstance(middle, nn.Conv2d) else {})})


@pytest.mark.parametrize(
    "reduce", [lambda x: x.sum((2, 3), keepdim=True), lambda x: nn.functional.avg_pool2d(x, 3, padding=1)]
)
def test_a_constant_is_another_one_after_a_sum_or_beside_padding(reduce, caplog):
    def forward(self, x):
        return self.head((1 - reduce(self.one(x)).abs()).abs())

    model = Function(forward, one=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.one.weight[1] = 0
        model.one.bias[1] = 1.0  # 1 - 1 would be zero
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        assert_removed(model, {})
    assert "depends on how many" not in caplog.text


@pytest.mark.slow
def test_depthwise_channels_go_with_their_inputs():
    def network():
        depthwise = nn.Conv2d(6, 12, 3, groups=6)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), depthwise, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1))
        with torch.no_grad():
            randomise(model)
        return model

    model = network()
    with torch.no_grad():  # Each input has two outputs. Both of input 3 are unread, and one of input 1.
        model[4].weight[:, [6, 7, 2]] = 0
    removed = {"0": ([], [3]), "1": ([], [6, 7]), "2": ([], [6, 7]), "4": ([6, 7], [])}
    report = assert_removed(model, removed, {"input": torch.randn(1, 3, 8, 6)})
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (5, 5, 10)
    assert model[2].num_features == 10 and model[4].in_channels == 10 and model[0].out_channels == 5
    assert LayerChannels("1", (6, 5), (12, 10)) in report.layers

    model = network()
    with torch.no_grad():  # Input 3 has no weights, but a shift makes output 7 differ from zero.
        model[1].weight[[6, 7]] = 0
        model[1].bias[[6, 7]] = 0
        model[2].bias[6] = -9
    assert_removed(model, {})


def test_grouped_convolutions_lose_whole_groups_only():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        model[4].weight[:, [0, 1, 6, 7, 8]] = 0  # two of three channels of group 0, all of group 2
    assert_removed(model, {"0": ([], [4, 5]), "2": ([], [6, 7, 8]), "4": ([6, 7, 8], [])})
    assert model[2].groups == 3 and model[2].in_channels == 6


@pytest.mark.slow
def test_a_layer_used_twice_serves_both():
    def forward(self, x):
        return self.head(self.shared(self.shared(self.stem(x)).relu()).relu())

    for zeroed, removed in (
        ({"head": [2]}, {}),
        ({"head": [2], "shared": [2]}, {"stem": ([], [2]), "shared": ([2], [2]), "head": ([2], [])}),
    ):
        model = Function(forward, stem=nn.Conv2d(3, 4, 1), shared=nn.Conv2d(4, 4, 3), head=nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            for name, indices in zeroed.items():
                getattr(model, name).weight[:, indices] = 0
        assert_removed(model, removed)


def test_parameters_tied_between_layers_stay_tied():
    def forward(self, x):
        return self.head(self.one(x).relu() + self.two(x).tanh())

    model = Function(forward, one=nn.Linear(9, 5), two=nn.Linear(9, 5), head=nn.Linear(5, 2))
    model.two.weight = model.one.weight
    with torch.no_grad():
        model.head.weight[:, 1] = 0
    assert_removed(model, {"one": ([], [1]), "two": ([], [1]), "head": ([1], [])})
    assert model.two.weight is model.one.weight


def test_a_layer_used_on_the_input_too_keeps_what_reads_the_input():
    def forward(self, x):
        return self.head(self.middle(self.shared(self.shared(x)).relu()).relu())

    model = Function(forward, shared=nn.Conv2d(3, 3, 1), middle=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
    with torch.no_grad():  # Nothing reads output 1 of the first layer, but the network's input has a channel 1.
        model.shared.weight[:, 1] = 0
        model.middle.weight[:, 1] = 0
        model.head.weight[:, 2] = 0
    assert_removed(model, {"middle": ([], [2]), "head": ([2], [])})


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.masked_fill(x < 0, 0.0),
        lambda x: x * ~(x < 0),
    ],
)
def test_activations_that_compare(activation):
    model = Function(
        lambda self, x: self.head(activation(self.one(x))), one=nn.Conv2d(3, 5, 1), head=nn.Conv2d(5, 2, 1)
    )
    with torch.no_grad():
        model.head.weight[:, 1] = 0
        model.one.weight[[2, 3]] = 0
        model.one.bias[[2, 3]] = torch.tensor([0.0, 0.5])
    assert_removed(model, {"one": ([], [1, 2]), "head": ([1, 2], [])})


def test_concatenated_channels_are_told_apart():
    def forward(self, x):
        return self.head(torch.cat([self.one(x), x[:, :1], self.two(x)], 1).relu())

    model = Function(forward, one=nn.Conv2d(3, 3, 1), two=nn.Conv2d(3, 4, 1), head=nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model.head.weight[:, [1, 3, 6]] = 0
    assert_removed(model, {"one": ([], [1]), "two": ([], [2]), "head": ([1, 6], [])})


@pytest.mark.parametrize(
    ("split", "removed"),
    [
        (lambda x: x.chunk(2, 1), {"one": ([], [1, 4]), "last": ([1], [2]), "head": ([2], [])}),
        # This code says how many channels a part has, so these stay, and the rest still goes.
        (lambda x: x.split(3, 1), {"last": ([], [2]), "head": ([2], [])}),
    ],
)
def test_channels_of_halves_that_are_multiplied_go_together(split, removed, caplog):
    def forward(self, x):
        one, two = split(self.one(x))
        return self.head(self.last(one.relu() * two))

    layers = {"one": nn.Conv2d(3, 6, 1), "last": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1)}
    model = Function(forward, **layers)
    with torch.no_grad():
        model.last.weight[:, 1] = 0
        model.head.weight[:, 2] = 0
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        assert_removed(model, removed)
    assert "depends on how many" not in caplog.text


def test_a_chain_of_dead_channels_goes_as_a_whole():
    model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[4].weight[:, 3] = 0  # Nothing reads this channel, so channels that only it reads are dead too.
        model[2].weight[:3, 1] = 0
    assert_removed(model, {"0": ([], [1]), "2": ([1], [3]), "4": ([3], [])})


def test_a_layer_keeps_a_channel():
    head = nn.Linear(5 * 5 * 5, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), head)
    with torch.no_grad():
        model[5].weight.zero_()
    reference = copy.deepcopy(model)
    remove_dead_channels(model, IMAGES)
    assert [len(model[0].weight), len(model[2].weight), model[5].weight.shape[1]] == [1, 1, 25]
    assert torch.equal(model(IMAGES["input"]), reference(IMAGES["input"]))


# What is left alone


def _slice(self, x):
    return self.head(self.one(x)[:, :2])


def _scaled(self, x):
    return self.head(self.one(x) * torch.arange(4.0, dtype=x.dtype)[:, None, None])


def _normed(self, x):
    return self.head(nn.functional.layer_norm(self.one(x), x.shape[2:]))


def _grouped_norm(self, x):
    return self.head(nn.functional.group_norm(self.one(x), 2))


def _softmax(self, x):
    return self.head(self.one(x).softmax(1))


def _on_another_dimension(self, x):
    return self.head(self.other(self.one(x)))


def _attention(self, x):
    x = self.one(x).flatten(2).transpose(1, 2)
    return self.head((x @ x.transpose(1, 2) @ x).transpose(1, 2).reshape(len(x), 4, 9, 9))


def _selected(self, x):
    return self.head(self.one(x)[:, 0].transpose(1, 2))


def _regrouped(self, x):
    return self.head(self.one(x).view(len(x), 6, 6, 9))


def _gated_by_one_channel(self, x):
    x = self.one(x)
    return self.head(x * self.other(x).sigmoid())


def _side_by_side(self, x):
    return self.head(torch.cat([self.one(x), self.one(x)], 3))


def _embedding_as_a_layer(self, x):
    return nn.functional.linear(self.one(x).transpose(1, 3), self.head.weight)


def _tied_to_something_else(self, x):
    return self.head(self.one(x)) + self.one.weight.sum()


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        pytest.param(_slice, {"head": nn.Conv2d(2, 2, 1)}, marks=pytest.mark.long),
        (_scaled, {}),
        (_grouped_norm, {}),
        pytest.param(_softmax, {}, marks=pytest.mark.long),
        (_attention, {}),
        (_selected, {"head": nn.Linear(9, 2)}),
        pytest.param(_regrouped, {"head": nn.Conv2d(6, 2, 1)}, marks=pytest.mark.long),
        (_gated_by_one_channel, {"other": nn.Conv2d(4, 1, 1)}),
        pytest.param(_side_by_side, {"head": nn.Linear(18, 2)}, marks=pytest.mark.long),
        (_embedding_as_a_layer, {"head": nn.Embedding(2, 4)}),
        (_tied_to_something_else, {}),
        (_on_another_dimension, {"other": nn.Linear(9, 6)}),
        (lambda self, x: self.head(self.one(x)), {"one": nn.ConvTranspose2d(3, 4, 1)}),
        (lambda self, x: self.head(self.one(x)), {"one": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))}),
        (lambda self, x: self.head(self.norm(self.one(x))), {"norm": nn.BatchNorm2d(4, track_running_stats=False)}),
        (lambda self, x: self.head(self.norm(self.one(x))), {"norm": nn.PReLU(4)}),
        pytest.param(lambda self, x: (self.head(self.one(x)), self.one(x)), {}, marks=pytest.mark.long),
        (lambda self, x: (self.head(self.one(x)), {"maps": [self.one(x), None]}), {}),
    ],
)
def test_what_is_not_understood_is_left_alone(function, layers, caplog):
    model = Function(function, **{"one": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1), **copy.deepcopy(layers)})
    with torch.no_grad():
        model.head.weight[:, 1] = 0
        for layer in (layers.get("other"), layers.get("one")):
            assert layer is None or layer.weight.any()
    reference = copy.deepcopy(model).eval()
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        report = remove_dead_channels(model, IMAGES)
    assert not report.changed
    assert "depends on how many" not in caplog.text  # This warning would show that the graph was misread.
    assert_same_tensors(model.state_dict(), reference.state_dict())


def test_norms_over_other_dimensions_are_left_alone_too():
    """The norm is over positions, in each channel. It is not known to be harmless, so the channels stay."""
    model = Function(_normed, one=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.head.weight[:, 1] = 0
    assert_removed(model, {})


@pytest.mark.slow
def test_code_that_counts_channels_is_noticed(caplog):
    for function in (
        lambda self, x: self.head(self.one(x).view(2, 4, 9, 9)),  # fails with another number of channels
        lambda self, x: self.head(self.one(x) * {4: 2.0}[self.one.out_channels]),
        lambda self, x: self.head(self.one(x) / self.one.out_channels),  # another value with another number
        lambda self, x: self.head(self.one(x)) > self.one.out_channels - 4,  # the same, as `bool`
    ):
        model = Function(function, one=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            model.head.weight[:, 1] = 0
        reference = copy.deepcopy(model)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_rtl"):
            assert not remove_dead_channels(model, IMAGES).changed
        assert "depends on how many" in caplog.text
        assert_same_tensors(model.state_dict(), reference.state_dict())
        assert torch.equal(model(IMAGES["input"]), reference(IMAGES["input"]))


def test_parameters_that_the_forward_does_not_use_may_read_anything(caplog):
    def forward(self, x):
        x = self.one(x).relu()
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    layers = {"one": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1), "auxiliary": nn.Conv2d(4, 2, 1)}
    model = Function(forward, **layers).train()
    with torch.no_grad():
        model.head.weight[:, 1] = 0
    with caplog.at_level(logging.WARNING, logger="hf_rtl"):
        assert not remove_dead_channels(model, IMAGES).changed
    assert "auxiliary.bias, auxiliary.weight" in caplog.text
    assert model.training and model(IMAGES["input"])[1].shape == (2, 2, 9, 9)


# What stays beside the channels


@pytest.mark.slow
def test_types_modes_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).bfloat16()
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].weight[:, 0] = 0
    model.train()
    with torch.inference_mode():
        remove_dead_channels(copy.deepcopy(model), IMAGES)
    assert remove_dead_channels(model, IMAGES).changed
    assert model.training and all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
