"""Tickets of whole models without the channels that never matter: outputs stay equal."""

import copy
import io
import logging

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
from hf_rtl.modeling.standalone import make_example_inputs, remove_dead_channels
from tests.modeling.channels import assert_outputs, assert_same_tensors, randomise, without


# Backbones


def plan_resnet(_):
    """Channels that nothing reads, that are zero after ReLU or after two layers, and one that only looks dead."""
    zeroed = {
        "timm_model.layer1.0.conv2.weight": {1: [1, 3]},
        "timm_model.layer2.0.conv1.weight": {0: [0, 5]},
        # Only layer 4, by two readers, reads the residual stream of layer 3, which a shortcut and a convolution make.
        # Channel 7 goes, since neither reads it; channel 8 stays, since one reads it.
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
        # Nothing reads channel 2 and its copy, which go. The copy of channel 3 is read, so 3 stays.
        "timm_model.blocks.0.0.ghost2.primary_conv.0.weight": {1: [2, 8 + 2, 3]},
        # Channels 4 and 36 + 4 are zero before squeeze-excitation, which reads everything. Channel 5 is not zero.
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
    """Hidden neurons go for zero columns, or zero rows if GELU of the bias is zero; residual streams never go."""
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
    """GPT-2 holds its weights transposed, and its activation consists of several operations."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) if kind in ("ghostnet", "bert", "t5") else kind for kind in PLANS],
)
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


@pytest.mark.slow
@pytest.mark.parametrize("keep", [pytest.param(0.1, marks=pytest.mark.long), 0.05])
def test_random_masks_on_a_residual_network(tiny_labels_model, fill_masks, keep):
    model = tiny_labels_model
    with torch.no_grad():
        randomise(model.backbone)
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # some constants above zero, some below
                nn.init.normal_(module.bias)
    model.norm_statistics.reset(model.backbone)
    for mask in (masks := fill_masks(model, keep=keep)):
        for weight in mask:  # a tenth of the channels loses all weights
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


@pytest.mark.slow
def test_nothing_to_remove_changes_nothing(tiny_labels_model, tmp_path):
    model = tiny_labels_model.eval()
    x = torch.randn(2, 3, 32, 32)
    ticket = model.extract_ticket("night", prune_structure=True)
    assert_same_tensors(ticket.state_dict(), model.extract_ticket("night").state_dict())
    assert torch.equal(ticket(x).logits, model(x, route_ids="night").logits)
    ticket.save_pretrained(tmp_path)
    assert_same_tensors(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), ticket.state_dict())


# The smaller ticket


@pytest.fixture(scope="module")
def pruned():
    """
    A model, the ticket of its second route without a channel of the first layer of the first block, and the log. Tests
    must not change them.
    """
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["cat", "dog", "owl"], ticket_task="membership", seed=0
    ).eval()
    mask = model.mask_bank["dog"]
    mask[model.mask_bank.weight_names.index("timm_model.layer1.0.conv2.weight")][:, 17] = False
    model.mask_bank["dog"] = mask
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("hf_rtl")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ticket = model.extract_ticket("dog", prune_structure=True)
    logger.removeHandler(handler)
    logger.setLevel(level)
    return model, ticket, text.getvalue()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_smaller_ticket_is_exported_but_not_saved(pruned, tmp_path):
    model, ticket, _ = pruned
    x = torch.randn(2, 3, 32, 32)
    expected = ticket(x).logits
    difference = (expected - model(x, route_ids="dog").logits).abs().max()
    assert difference <= 1e-6 * expected.abs().max()
    for save in (ticket.save_pretrained, ticket.push_to_hub, copy.deepcopy(ticket).save_pretrained):
        with pytest.raises(ValueError, match=r"torch\.export.*prune_structure"):
            save(str(tmp_path / "ticket"))
    assert not (tmp_path / "ticket").exists()
    torch.export.save(torch.export.export(ticket, (), {"pixel_values": x}), tmp_path / "ticket.pt2")
    loaded = torch.export.load(tmp_path / "ticket.pt2").module()
    assert torch.equal(loaded(pixel_values=x).logits, expected)


@pytest.mark.slow
def test_a_smaller_ticket_trains_on(pruned):
    model, ticket, _ = pruned
    ticket = copy.deepcopy(ticket)
    ticket.train()(torch.randn(4, 3, 32, 32), labels=torch.ones(4, 1)).loss.backward()
    assert all(parameter.grad is not None for parameter in ticket.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# Example inputs


def test_example_inputs(tiny_t5_config, tiny_vit_config, tiny_bert_config):
    vit = AutoModelForImageClassification.from_config(tiny_vit_config)
    assert make_example_inputs(vit)["pixel_values"].shape == (2, 3, 8, 8)
    gray = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["a", "b"], ticket_task="membership", in_chans=1
    ).backbone
    assert make_example_inputs(gray)["pixel_values"].shape == (2, 1, 160, 160)
    assert make_example_inputs(AutoModelForSeq2SeqLM.from_config(tiny_t5_config)).keys() >= {"decoder_input_ids"}
    assert make_example_inputs(AutoModelForSequenceClassification.from_config(tiny_bert_config)).keys() == {
        "input_ids"
    }
    with pytest.raises(ValueError, match=r"`example_inputs` cannot be made for Linear.*example_inputs="):
        remove_dead_channels(nn.Linear(2, 2))


@pytest.mark.slow
def test_extract_ticket_passes_example_inputs(tiny_membership_model):
    with pytest.raises(Exception, match="channels"):
        tiny_membership_model.extract_ticket(
            0, prune_structure=True, example_inputs={"pixel_values": torch.randn(2, 5, 32, 32)}
        )
