"""Sums of squared inputs, compared with loops over samples, positions and weights in float64."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_rtl.training.activity import add_up, input_squares


class Layers(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.config, self.layer = PreTrainedConfig(), layer

    def forward(self, x):
        return self.layer(x)


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3, padding=1),
    "groups, stride and dilation": nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=(2, 1)),
    "depthwise": nn.Conv2d(4, 4, (1, 3), groups=4),
    "one dimension": nn.Conv1d(4, 2, 3, stride=2, padding=1, groups=2),
    "padding by reflection": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_each_element_of_a_kernel_has_the_positions_that_it_multiplies(kind):
    """The reference: the derivative of an output by an element of the kernel is the input that it multiplies."""
    layer = CONVOLUTIONS[kind].double()
    x = torch.randn(2, layer.in_channels, *[7, 9][: layer.weight.ndim - 2], dtype=torch.float64)
    (found,) = input_squares(Layers(layer), ["layer.weight"], [{"x": x}], per_weight=True)
    squares = found["layer.weight"][0]
    per_group, groups = layer.weight.shape[1], layer.groups
    expected = torch.zeros_like(squares)
    for group in range(groups):
        output = group * (layer.out_channels // groups)
        for value in layer(x)[:, output].flatten():
            (gradient,) = torch.autograd.grad(value, layer.weight, retain_graph=True)
            expected[group * per_group : (group + 1) * per_group] += gradient[output].square()
    assert torch.allclose(squares, expected, rtol=1e-10)
    (channels,) = input_squares(Layers(layer), ["layer.weight"], [{"x": x}], per_weight=False)
    loops = [sum(float(v) ** 2 for sample in x for v in sample[channel].flatten()) for channel in range(x.shape[1])]
    assert channels["layer.weight"][0].tolist() == pytest.approx(loops, rel=1e-10)
    assert channels["layer.weight"][1] == x[:, 0].numel()


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_inputs_of_matrices_in_loops_however_they_are_batched(layer):
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    network = Layers(layer.double())
    expected = [sum(float(value) ** 2 for value in x[..., channel].flatten()) for channel in range(5)]
    for sizes in ([6], [1, 2, 3], [4, 2]):
        batches = [{"x": part} for part in x.split(sizes)]
        found = input_squares(network, ["layer.weight"], batches, per_weight=True)
        assert len(found) == len(sizes)
        squares, count = add_up(found)["layer.weight"]
        assert (
            squares.dtype == torch.float64 and squares.tolist() == pytest.approx(expected, rel=1e-12) and count == 24
        )


def test_sums_of_half_precision_are_float64():
    x = torch.full((1, 4096, 5), 300.0, dtype=torch.float16)
    (found,) = input_squares(Layers(nn.Linear(5, 3).half()), ["layer.weight"], [{"x": x}], per_weight=True)
    assert found["layer.weight"][0].tolist() == [300.0**2 * 4096] * 5


def test_convolutions_of_three_dimensions_have_sums_of_channels_alone():
    network, x = Layers(nn.Conv3d(2, 2, 3)), torch.randn(1, 2, 4, 4, 4)
    assert input_squares(network, ["layer.weight"], [{"x": x}], per_weight=False)[0]["layer.weight"][0].shape == (2,)
    with pytest.raises(ValueError, match="convolutions of three dimensions"):
        input_squares(network, ["layer.weight"], [{"x": x}], per_weight=True)
