"""Channels that never matter are removed, exactly those, and outputs stay what they were."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from hf_rtl import (
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
)
from hf_rtl.structure import LayerChannels, example_inputs_of, remove_dead_channels


IMAGES = {"input": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))}


class Function(nn.Module):
    """`forward(input)` is `function(self, input)`; layers are attributes."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, input):
        return self.function(self, input)


def randomise(model):
    """Random statistics, and shifts that leave a channel of zeros above zero, so that it does not look dead."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(-torch.rand(module.running_mean.shape))
            module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 1.0)
    return model.eval()


def without(state, removed):
    """
    `state` less what `removed` lists: module -> (input channels, output channels), or tensor -> dimension -> indices.
    """
    state = dict(state)
    for name, channels in removed.items():
        if isinstance(channels, dict):
            cuts = {name: channels}
        else:
            inputs, outputs = channels
            cuts = {f"{name}.weight": {1: inputs} if inputs else {}}
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if outputs and f"{name}.{tensor}" in state:
                    cuts.setdefault(f"{name}.{tensor}", {})[0] = outputs
        for tensor, dims in cuts.items():
            for dim, indices in dims.items():
                kept = [index for index in range(state[tensor].shape[dim]) if index not in indices]
                state[tensor] = state[tensor].index_select(dim, torch.tensor(kept))
    return state


def assert_same_tensors(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].shape == tensor.shape, name
        assert torch.equal(state[name], tensor), name


def logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_outputs(model, reference, *batches):
    """Equal to rounding in float64 and in float32."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        one, other = copy.deepcopy(model).to(dtype), copy.deepcopy(reference).to(dtype)
        for batch in batches:
            batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
            expected = logits(other, batch)
            assert expected.std() > 0
            assert (logits(one, batch) - expected).abs().max() <= tolerance * expected.abs().max()


def assert_removed(model, removed, *batches, example=IMAGES):
    """`remove_dead_channels` takes away what `removed` says (see `without`), no more and no less."""
    reference = copy.deepcopy(model)
    report = remove_dead_channels(model, example)
    assert_same_tensors(model.state_dict(), without(reference.state_dict(), removed))
    assert_outputs(model, reference, example, *batches)
    return report


# Backbones


def plan_resnet(_):
    """Never read; zero after batch norm and ReLU; zero after two layers; and one that looks dead but is not."""
    zeroed = {
        "timm_model.layer1.0.conv2.weight": {1: [1, 3]},
        "timm_model.layer2.0.conv1.weight": {0: [0, 5]},
        # The residual stream of layer 3, which its shortcut and its last convolution make, is read by layer 4 alone:
        # it goes where nothing reads it, 7, and not where only one of its two readers does not, 8.
        "timm_model.layer4.0.conv1.weight": {1: [7, 8]},
        "timm_model.layer4.0.downsample.1.weight": {1: [7]},
    }
    values = {"timm_model.layer2.0.bn1.bias": {0: -9.0}}
    norms = ["layer3.0.bn3", "layer3.0.downsample.2"]
    removed = {
        "timm_model.layer1.0.conv1": ([], [1, 3]),
        "timm_model.layer1.0.bn1": ([], [1, 3]),
        "timm_model.layer1.0.conv2": ([1, 3], []),
        "timm_model.layer2.0.conv1": ([], [0]),
        "timm_model.layer2.0.bn1": ([], [0]),
        "timm_model.layer2.0.conv2": ([0], []),
        "timm_model.layer3.0.conv3": ([], [7]),
        "timm_model.layer3.0.downsample.1": ([], [7]),
        **{f"timm_model.{norm}": ([], [7]) for norm in norms},
        "timm_model.layer4.0.conv1": ([7], []),
        "timm_model.layer4.0.downsample.1": ([7], []),
    }
    batches = [{"pixel_values": torch.randn(size)} for size in ((1, 3, 40, 40), (3, 3, 33, 50))]
    return RTLModelForImageClassification, "test_resnet", {"num_labels": 4}, zeroed, values, removed, batches


def plan_ghostnet(_):
    """Ghost modules concatenate channels and cheap copies of them; squeeze-excitation reads and scales them."""
    zeroed = {
        # Both halves unread: 2 and its copy. One half unread: 3 stays.
        "timm_model.blocks.0.0.ghost2.primary_conv.0.weight": {1: [2, 8 + 2, 3]},
        # Zero before squeeze-excitation, which is not pruned and reads everything: 4, 36 + 4. Shifted from zero: 5.
        "timm_model.blocks.3.0.conv_dw.weight": {0: [4, 36 + 4, 5, 36 + 5]},
    }
    norm = "timm_model.blocks.3.0.bn_dw"
    values = {f"{norm}.{name}": {4: 0.0, 36 + 4: 0.0, 5: 0.0} for name in ("bias", "running_mean")}
    ghost, dw = "timm_model.blocks.0.0.ghost", "timm_model.blocks.3.0"
    removed = {
        **{f"{ghost}1.{part}": ([], [2]) for part in ("primary_conv.0", "primary_conv.1")},
        **{f"{ghost}1.{part}": ([], [2]) for part in ("cheap_operation.0", "cheap_operation.1")},
        f"{ghost}2.primary_conv.0": ([2, 10], []),
        **{f"{dw}.ghost1.{part}": ([], [4]) for part in ("primary_conv.0", "primary_conv.1")},
        **{f"{dw}.ghost1.{part}": ([], [4]) for part in ("cheap_operation.0", "cheap_operation.1")},
        **{f"{dw}.{part}": ([], [4, 40]) for part in ("conv_dw", "bn_dw", "se.conv_expand")},
        f"{dw}.se.conv_reduce": ([4, 40], []),
        f"{dw}.ghost2.primary_conv.0": ([4, 40], []),
    }
    batches = [{"pixel_values": torch.randn(size)} for size in ((1, 3, 32, 32), (3, 3, 40, 56))]
    return RTLModelForImageClassification, "ghostnet_rtl", {"num_labels": 4}, zeroed, values, removed, batches


def plan_vit(request):
    """Hidden neurons go, by zero columns, or by zero rows if GELU of the bias is zero; residual streams never do."""
    block = "vit.layers.1"
    zeroed = {
        f"{block}.mlp.fc1.weight": {0: [5, 6]},
        f"{block}.mlp.fc2.weight": {0: [2], 1: [9]},
        f"{block}.attention.q_proj.weight": {0: [0], 1: [3]},
        f"{block}.attention.v_proj.weight": {0: [0]},
        f"{block}.attention.o_proj.weight": {1: [0]},
        "vit.layers.0.mlp.fc2.weight": {0: [2]},
    }
    values = {f"{block}.mlp.fc1.bias": {5: 0.0, 6: 0.3}}
    removed = {f"{block}.mlp.fc1": ([], [5, 9]), f"{block}.mlp.fc2": ([5, 9], [])}
    batches = [{"pixel_values": torch.randn(5, 3, 8, 8)}]
    source = request.getfixturevalue("tiny_vit_config")
    return RTLModelForImageClassification, source, {}, zeroed, values, removed, batches


def plan_bert(request):
    block = "bert.encoder.layer.0"
    zeroed = {
        f"{block}.intermediate.dense.weight": {0: [0, 1]},
        f"{block}.output.dense.weight": {1: [7]},
        f"{block}.attention.self.query.weight": {0: [3]},
        "bert.pooler.dense.weight": {0: [4]},
    }
    values = {f"{block}.intermediate.dense.bias": {0: 0.0, 1: -0.2}, "bert.pooler.dense.bias": {4: 0.0}}
    removed = {
        f"{block}.intermediate.dense": ([], [0, 7]),
        f"{block}.output.dense": ([0, 7], []),
        "bert.pooler.dense": ([], [4]),
        "classifier": ([4], []),
    }
    ids = torch.randint(0, 40, (2, 11))
    batches = [{"input_ids": ids, "attention_mask": ids.gt(5).long(), "token_type_ids": ids.gt(20).long()}]
    source = request.getfixturevalue("tiny_bert_config")
    return RTLModelForSequenceClassification, source, {}, zeroed, values, removed, batches


def plan_t5(request):
    encoder, decoder = "encoder.block.1.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"
    zeroed = {f"{encoder}.wi.weight": {0: [3]}, f"{decoder}.wo.weight": {1: [0]}}
    removed = {f"{encoder}.wi": ([], [3]), f"{encoder}.wo": ([3], [])}
    removed |= {f"{decoder}.wi": ([], [0]), f"{decoder}.wo": ([0], [])}
    batches = [{"input_ids": torch.randint(2, 40, (2, 7)), "decoder_input_ids": torch.randint(2, 40, (2, 4))}]
    return RTLModelForSeq2SeqLM, request.getfixturevalue("tiny_t5_config"), {}, zeroed, {}, removed, batches


def plan_gpt2(request):
    """Its layers hold their weights transposed, and its activation is made of several ops."""
    block = "transformer.h.0.mlp"
    zeroed = {f"{block}.c_fc.weight": {1: [2]}, f"{block}.c_proj.weight": {0: [5]}}
    removed = {f"{block}.c_fc.weight": {1: [2, 5]}, f"{block}.c_fc.bias": {0: [2, 5]}}
    removed |= {f"{block}.c_proj.weight": {0: [2, 5]}}
    batches = [{"input_ids": torch.randint(0, 40, (2, 9))}]
    values = {f"{block}.c_fc.bias": {2: 0.0}}
    return RTLModelForCausalLM, request.getfixturevalue("tiny_gpt2_config"), {}, zeroed, values, removed, batches


PLANS = {
    "resnet": plan_resnet,
    "ghostnet": plan_ghostnet,
    "vit": plan_vit,
    "bert": plan_bert,
    "t5": plan_t5,
    "gpt2": plan_gpt2,
}


@pytest.mark.parametrize("kind", PLANS)
def test_planted_channels_go_and_no_others(request, kind):
    cls, source, arguments, zeroed, values, removed, batches = PLANS[kind](request)
    model = cls.from_backbone(source, route_names=["a", "b"], ticket_task="labels", seed=0, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter == 0, 0.1, parameter))
        randomise(model.backbone)
        for name, channels in values.items():
            for index, value in channels.items():
                model.backbone.state_dict()[name][index] = value
    model.norm_statistics.reset(model.backbone)
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in model.config.prunable}
    for name, dims in zeroed.items():
        for dim, indices in dims.items():
            masks[name].index_fill_(dim, torch.tensor(indices), False)
    model.mask_bank["b"] = list(masks.values())

    ticket = model.extract_ticket("b")
    smaller = model.extract_ticket("b", prune_structure=True)
    assert_same_tensors(smaller.state_dict(), without(ticket.state_dict(), removed))
    assert_outputs(smaller, ticket, *batches)


@pytest.mark.parametrize("keep", [0.1, 0.05])
def test_random_masks_on_a_residual_network(tiny_labels_model, fill_masks, keep):
    model = tiny_labels_model
    with torch.no_grad():
        randomise(model.backbone)
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # some constants above zero, some below
                nn.init.normal_(module.bias)
    model.norm_statistics.reset(model.backbone)
    for mask in (masks := fill_masks(model, keep=keep)):
        for weight in mask:  # leaves a tenth of the channels nothing
            weight[torch.rand(len(weight)) < 0.1] = False
    for route, mask in enumerate(masks):
        model.mask_bank[route] = mask
    ticket, smaller = model.extract_ticket("dusk"), model.extract_ticket("dusk", prune_structure=True)
    count = [sum(p.numel() for p in network.parameters()) for network in (ticket, smaller)]
    assert count[1] < count[0] - 5000
    batches = [{"pixel_values": torch.randn(size)} for size in ((3, 3, 40, 56), (1, 3, 64, 64))]
    assert_outputs(smaller, ticket, *batches)
    again = remove_dead_channels(copy.deepcopy(smaller), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert not again.changed


# Against brute force


def make_chain(seed, keep):
    """A chain of layers with a fraction `keep` of the weights of its wide ones, and shifts around zero."""
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
                if tensor.ndim > 1:  # few weights a channel are all gone often enough
                    rate = keep if tensor[0].numel() > 24 else 0.3
                    tensor.mul_(torch.rand(tensor.shape, generator=generator) < rate)
    return chain.eval()


@torch.no_grad()
def kept_by_brute_force(chain):
    """Per layer with weights: (indices kept of its inputs, of its outputs), found channel by channel."""
    values = [[None] * 3]  # of every channel before each layer: a constant, or None if it depends on the input
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
            for later in kept.values():  # the linear layer after it keeps a channel's positions together
                if later[2] == "flat":
                    later[0] = [4 * channel + i for channel, needs in enumerate(needed) if needs for i in range(4)]
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        outputs = [out for out, needs in enumerate(needed) if needs]
        if getattr(layer, "groups", 1) > 1:
            kept[index] = [None, outputs, ""]  # each input channel lives and dies with its output
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


@pytest.mark.parametrize("keep", [0.1, 0.05])
def test_a_chain_against_brute_force(keep):
    num_removed = 0
    for seed in range(4):
        chain = make_chain(seed, keep)
        reference = copy.deepcopy(chain)
        kept = kept_by_brute_force(chain)
        remove_dead_channels(chain, {"input": torch.randn(2, 3, 8, 8)})
        for index, (inputs, outputs, _) in kept.items():
            layer, before = chain[index], reference[index]
            # One channel stays where none is needed: the first.
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
    """Channel 1 stays, as the exit reads it; what the branch adds to it after that, which nothing reads, goes."""

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


def test_a_constant_beside_zero_padding_is_no_constant():
    """The border sees fewer of it, so what a convolution makes of it is not constant; nor is a padded average."""
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


def test_depthwise_channels_go_with_what_they_are_made_of():
    def network():
        depthwise = nn.Conv2d(6, 12, 3, groups=6)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), depthwise, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1))
        with torch.no_grad():
            randomise(model)
        return model

    model = network()
    with torch.no_grad():  # each input has two outputs: both of input 3 unread, one of input 1
        model[4].weight[:, [6, 7, 2]] = 0
    removed = {"0": ([], [3]), "1": ([], [6, 7]), "2": ([], [6, 7]), "4": ([6, 7], [])}
    report = assert_removed(model, removed, {"input": torch.randn(1, 3, 8, 6)})
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (5, 5, 10)
    assert model[2].num_features == 10 and model[4].in_channels == 10 and model[0].out_channels == 5
    assert LayerChannels("1", (6, 5), (12, 10)) in report.layers

    model = network()
    with torch.no_grad():  # no weights at input 3, but a shift: output 7 is not zero
        model[1].weight[[6, 7]] = 0
        model[1].bias[[6, 7]] = 0
        model[2].bias[6] = -9
    assert_removed(model, {})


def test_grouped_convolutions_lose_whole_groups_only():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        model[4].weight[:, [0, 1, 6, 7, 8]] = 0  # two of the three of group 0, all of group 2
    assert_removed(model, {"0": ([], [4, 5]), "2": ([], [6, 7, 8]), "4": ([6, 7, 8], [])})
    assert model[2].groups == 3 and model[2].in_channels == 6


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
    with torch.no_grad():  # nothing reads output 1 of the first layer, but its input 1 comes from outside
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


def test_a_chain_of_dead_channels_goes_as_a_whole():
    model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[4].weight[:, 3] = 0  # never read, so what only it reads is not either
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


def _split(self, x):
    one, two = self.one(x).chunk(2, 1)
    return self.head(one * two)


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


def _tied_to_something_else(self, x):
    return self.head(self.one(x)) + self.one.weight.sum()


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (_split, {"head": nn.Conv2d(2, 2, 1)}),
        (_slice, {"head": nn.Conv2d(2, 2, 1)}),
        (_scaled, {}),
        (_grouped_norm, {}),
        (_softmax, {}),
        (_attention, {}),
        (_tied_to_something_else, {}),
        (_on_another_dimension, {"other": nn.Linear(9, 6)}),
        (lambda self, x: self.head(self.one(x)), {"one": nn.ConvTranspose2d(3, 4, 1)}),
        (lambda self, x: self.head(self.one(x)), {"one": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))}),
        (lambda self, x: self.head(self.norm(self.one(x))), {"norm": nn.BatchNorm2d(4, track_running_stats=False)}),
        (lambda self, x: self.head(self.norm(self.one(x))), {"norm": nn.PReLU(4)}),
        (lambda self, x: (self.head(self.one(x)), self.one(x)), {}),
        (lambda self, x: (self.head(self.one(x)), {"maps": [self.one(x), None]}), {}),
    ],
)
def test_what_is_not_understood_is_left_alone(function, layers):
    model = Function(function, **{"one": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1), **copy.deepcopy(layers)})
    with torch.no_grad():
        model.head.weight[:, 1] = 0
        for layer in (layers.get("other"), layers.get("one")):
            assert layer is None or layer.weight.any()
    reference = copy.deepcopy(model).eval()
    report = remove_dead_channels(model, IMAGES)
    assert not report.changed
    assert_same_tensors(model.state_dict(), reference.state_dict())


def test_norms_over_other_dimensions_are_left_alone_too():
    """Positions are normed, each channel by itself: not known to be harmless, so the channels stay."""
    model = Function(_normed, one=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.head.weight[:, 1] = 0
    assert_removed(model, {})


def test_code_that_counts_channels_is_noticed(caplog):
    for function in (
        lambda self, x: self.head(self.one(x).view(2, 4, 9, 9)),  # fails with another number
        lambda self, x: self.head(self.one(x) * {4: 2.0}[self.one.out_channels]),
        lambda self, x: self.head(self.one(x) / self.one.out_channels),  # or gives something else
        lambda self, x: self.head(self.one(x)) > self.one.out_channels - 4,  # here `bool`
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


def test_nothing_to_remove_changes_nothing(tiny_labels_model, tmp_path):
    model = tiny_labels_model.eval()
    x = torch.randn(2, 3, 32, 32)
    ticket = model.extract_ticket("night", prune_structure=True)
    assert_same_tensors(ticket.state_dict(), model.extract_ticket("night").state_dict())
    assert torch.equal(ticket(x).logits, model(x, route_ids="night").logits)
    ticket.save_pretrained(tmp_path)
    assert_same_tensors(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), ticket.state_dict())


# The ticket that comes out


@pytest.fixture
def pruned(tiny_membership_model, caplog):
    """A model; the ticket of its second route, without a channel of the first block's first layer; what was logged."""
    model = tiny_membership_model.eval()
    mask = model.mask_bank["dog"]
    mask[model.mask_bank.weight_names.index("timm_model.layer1.0.conv2.weight")][:, 17] = False
    model.mask_bank["dog"] = mask
    with caplog.at_level(logging.INFO, logger="hf_rtl"):
        ticket = model.extract_ticket("dog", prune_structure=True)
    return model, ticket, caplog.text


def test_the_report_is_logged(pruned):
    _, ticket, text = pruned
    before, after = 372_785, 372_785 - 2 * 9 * 32 - 2
    assert sum(parameter.numel() for parameter in ticket.parameters()) == after
    assert "ticket of route dog" in text and f"parameters {before:,} -> {after:,}" in text
    rows = [line.split() for line in text.splitlines() if "->" in line]
    assert rows[:-1] == [
        ["timm_model.layer1.0.conv1", "in", "32", "->", "32", "out", "32", "->", "31"],
        ["timm_model.layer1.0.conv2", "in", "32", "->", "31", "out", "32", "->", "32"],
    ]


def test_a_smaller_ticket_is_exported_but_not_saved(pruned, tmp_path):
    model, ticket, _ = pruned
    x = torch.randn(2, 3, 32, 32)
    expected = ticket(x).logits
    difference = (expected - model(x, route_ids="dog").logits).abs().max()
    assert difference <= 1e-6 * expected.abs().max()
    for save in (ticket.save_pretrained, ticket.push_to_hub, copy.deepcopy(ticket).save_pretrained):
        with pytest.raises(ValueError, match=r"prune_structure=True.*torch\.export"):
            save(str(tmp_path / "ticket"))
    assert not (tmp_path / "ticket").exists()
    torch.export.save(torch.export.export(ticket, (), {"pixel_values": x}), tmp_path / "ticket.pt2")
    loaded = torch.export.load(tmp_path / "ticket.pt2").module()
    assert torch.equal(loaded(pixel_values=x).logits, expected)


def test_a_smaller_ticket_trains_on(pruned):
    model, ticket, _ = pruned
    ticket.train()(torch.randn(4, 3, 32, 32), labels=torch.ones(4, 1)).loss.backward()
    assert all(parameter.grad is not None for parameter in ticket.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


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


# Example inputs


def test_example_inputs(tiny_t5_config, tiny_vit_config, tiny_bert_config):
    vit = AutoModelForImageClassification.from_config(tiny_vit_config)
    assert example_inputs_of(vit)["pixel_values"].shape == (2, 3, 8, 8)
    gray = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b"], ticket_task="membership", in_chans=1
    ).backbone
    assert example_inputs_of(gray)["pixel_values"].shape == (2, 1, 160, 160)
    assert example_inputs_of(AutoModelForSeq2SeqLM.from_config(tiny_t5_config)).keys() >= {"decoder_input_ids"}
    assert example_inputs_of(AutoModelForSequenceClassification.from_config(tiny_bert_config)).keys() == {"input_ids"}
    with pytest.raises(ValueError, match=r"`example_inputs` cannot be made for Linear.*example_inputs="):
        remove_dead_channels(nn.Linear(2, 2))


def test_extract_ticket_passes_example_inputs(tiny_membership_model):
    with pytest.raises(Exception, match="channels"):
        tiny_membership_model.extract_ticket(
            0, prune_structure=True, example_inputs={"pixel_values": torch.randn(2, 5, 32, 32)}
        )
