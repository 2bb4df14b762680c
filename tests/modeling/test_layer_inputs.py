"""What layers are given on samples: without padding, for every call, and with nothing left behind."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_rtl.modeling.layer_inputs import LayerInputs
from tests.modeling.small_backbones import build


def collect(network, names, batches):
    found = {name: [] for name in names}
    LayerInputs(network, names, lambda name, x: found[name].append(x.clone())).run(batches)
    return {name: torch.cat(parts) for name, parts in found.items()}


def naive(network, name, samples):
    """The inputs of a layer on samples given one by one, without padding, all positions below one another."""
    module, rows = network.get_submodule(name.rpartition(".")[0]), []
    hook = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for sample in samples:
            network(**sample)
    hook.remove()
    return torch.cat(rows)


def padded(rows, side):
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": pad_sequence(rows, batch_first=True, padding_side=side), "attention_mask": mask}


LAYERS = {
    "bert": "bert.encoder.layer.1.output.dense.weight",
    "gpt2": "transformer.h.1.mlp.c_proj.weight",
    "llama": "model.layers.1.mlp.down_proj.weight",
    # A layer that is called twice.
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight",
}


# BERT and ALBERT count positions from the first token, also from a padded one.
@pytest.mark.parametrize(
    ("name", "side"), [*((name, "right") for name in LAYERS), ("gpt2", "left"), ("llama", "left")]
)
def test_padding_does_not_count(name, side):
    network, _ = build(name)
    network = network.double()
    rows = [torch.randint(3, 40, (length,)) for length in (6, 3, 5)]
    batch = padded(rows, side)
    if name in ("gpt2", "llama"):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = collect(network, [LAYERS[name]], [batch])[LAYERS[name]]
    expected = naive(network, LAYERS[name], [{"input_ids": row[None]} for row in rows])
    # Called twice, a layer gives all samples' first calls before the second ones.
    order = [tensor.square().sum(1).sort().indices for tensor in (found, expected)]
    assert torch.allclose(found[order[0]], expected[order[1]], rtol=1e-9, atol=1e-12)


def test_encoder_and_decoder_have_masks_of_their_own():
    network, _ = build("t5")
    network = network.double()
    sources = [torch.randint(3, 40, (length,)) for length in (6, 3)]
    targets = [torch.randint(3, 40, (length,)) for length in (2, 6)]
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)
    names = [
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "decoder.block.0.layer.2.DenseReluDense.wo.weight",
        # Keys of cross attention lie in the decoder and read the encoder.
        "decoder.block.0.layer.1.EncDecAttention.k.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ]
    found = collect(network, names, [{**padded(sources, "right"), "labels": labels}])
    samples = [
        {"input_ids": source[None], "labels": target[None]} for source, target in zip(sources, targets, strict=True)
    ]
    for name, count in zip(names, (9, 8, 9, 8), strict=True):
        expected = naive(network, name, samples)
        assert len(found[name]) == count and torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind():
    network, inputs = build("bottlenecks")
    network.train()
    network.timm_model.layer1.eval()
    flags = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = "timm_model.layer2.0.conv2.weight"
    assert collect(network, [name], [inputs])[name].shape[1] == 16
    with pytest.raises(RuntimeError, match="stopped"):
        LayerInputs(network, [name], lambda *_: (_ for _ in ()).throw(RuntimeError("stopped"))).run([inputs])
    assert flags == [module.training for module in network.modules()]
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_weight_without_a_single_input_is_refused():
    network, _ = build("bert")
    with pytest.raises(ValueError, match="word_embeddings.weight is no weight of a linear layer or convolution"):
        LayerInputs(network, ["bert.embeddings.word_embeddings.weight"], lambda *_: None)
