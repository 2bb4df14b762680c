"""Activities of whole networks, compared in float64 with loops over samples, positions and weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_rtl.pruning import unit_activity, weight_activity
from hf_rtl.training.activity import add_up, input_squares
from tests.modeling.small_backbones import build


READERS = {
    "bert": ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.key.weight"],
    "gpt2": ["transformer.h.0.mlp.c_proj.weight", "transformer.h.1.attn.c_attn.weight"],
    "llama": ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.gate_proj.weight"],
    # Called twice in a forward.
    "albert": [
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}.weight" for name in ("ffn_output", "ffn")
    ],
    "t5": [
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "decoder.block.0.layer.2.DenseReluDense.wo.weight",
        "decoder.block.0.layer.1.EncDecAttention.v.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ],
}
CASES = [(name, "right") for name in READERS] + [("gpt2", "left"), ("llama", "left")]


def samples_of(name):
    generator = torch.Generator().manual_seed(2)
    lengths = [(6, 2), (3, 5), (5, 3), (2, 6), (4, 4)]
    rows = [[torch.randint(3, 40, (length,), generator=generator) for length in pair] for pair in lengths]
    return [pair if name == "t5" else pair[:1] for pair in rows]


def batch_of(name, samples, side):
    batch = {}
    for prefix, rows in zip(("", "decoder_"), zip(*samples, strict=True), strict=False):
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        batch[f"{prefix}input_ids"] = pad_sequence(rows, batch_first=True, padding_value=0, padding_side=side)
        batch[f"{prefix}attention_mask"] = mask
        if name in ("gpt2", "llama"):
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def naive_squares(network, names, samples):
    """The sums of squares that every reader is given, by channel, and the number of positions, without padding."""
    squares, counts = {name: {} for name in names}, dict.fromkeys(names, 0)

    def count(name):
        def hook(module, args):
            for position in args[0].reshape(-1, args[0].shape[-1]).tolist():
                counts[name] += 1
                for channel, value in enumerate(position):
                    squares[name][channel] = squares[name].get(channel, 0.0) + value * value

        return hook

    hooks = [
        network.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(count(name)) for name in names
    ]
    with torch.no_grad():
        for sample in samples:
            network(**dict(zip(("input_ids", "decoder_input_ids"), (row[None] for row in sample), strict=False)))
    for hook in hooks:
        hook.remove()
    return squares, counts


@pytest.mark.parametrize(("name", "side"), CASES)
def test_scores_of_units_and_weights_do_not_depend_on_padding_and_batches(name, side):
    network, samples = build(name)[0].double(), samples_of(name)
    squares, counts = naive_squares(network, READERS[name], samples)
    calls = 2 if name == "albert" else 1
    assert counts[READERS[name][0]] == calls * 20  # the lengths of all samples
    for sizes in ([5], [1, 1, 1, 1, 1], [2, 3]):
        parts = iter(samples)
        batches = [batch_of(name, [next(parts) for _ in range(size)], side) for size in sizes]
        found = add_up(input_squares(network, READERS[name], batches, per_weight=True))
        for reader in READERS[name]:
            sums, count = found[reader]
            assert count == counts[reader]
            transposed = isinstance(network.get_submodule(reader.removesuffix(".weight")), Conv1D)
            weight = network.get_parameter(reader).detach()
            weight = weight.T if transposed else weight
            columns = weight.T.tolist()
            units = unit_activity([(sums / count)[:, None]], [weight.T[:, None]]).tolist()
            weights = weight_activity(weight, sums).T.tolist()
            for channel, column in enumerate(columns):
                expected = squares[reader][channel] / count * math.fsum(value**2 for value in column)
                assert units[channel] == pytest.approx(expected, rel=1e-6, abs=1e-12)
                norm = math.sqrt(squares[reader][channel])
                assert weights[channel] == pytest.approx([abs(v) * norm for v in column], rel=1e-6, abs=1e-12)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = PreTrainedConfig()
        self.layer = nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1), padding=(1, 0)).double()

    def forward(self, x):
        return self.layer(x)


def test_scores_of_a_convolution_in_loops():
    """Groups, stride and padding: every output position, and what each element of its kernel multiplies there."""
    network, x = Convolution(), torch.randn(3, 4, 5, 4, dtype=torch.float64)
    weight, data = network.layer.weight.detach(), x.tolist()
    squares = torch.zeros(4, 3, 2, dtype=torch.float64)
    for sample in data:
        for channel in range(4):
            for top in range(-1, 4, 2):  # three rows of outputs
                for left in range(3):
                    for row in range(3):
                        for column in range(2):
                            if 0 <= top + row < 5:
                                value = sample[channel][top + row][left + column]
                                squares[channel, row, column] += value * value
    for sizes in ([3], [1, 2]):
        batches = [{"x": part} for part in x.split(sizes)]
        found = add_up(input_squares(network, ["layer.weight"], batches, per_weight=True))["layer.weight"][0]
        scores = weight_activity(weight, found)
        for output in range(6):
            for position in range(2):
                norms = squares[position + 2 * (output // 3)].sqrt()
                expected = weight[output, position].abs() * norms
                torch.testing.assert_close(scores[output, position], expected, rtol=1e-12, atol=0)
        sums, count = add_up(input_squares(network, ["layer.weight"], batches, per_weight=False))["layer.weight"]
        assert count == 3 * 5 * 4
        for channel in range(4):
            total = math.fsum(value**2 for sample in data for row in sample[channel] for value in row)
            assert float(sums[channel]) == pytest.approx(total, rel=1e-12)
