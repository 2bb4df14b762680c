"""Networks whose channels are removed, and checks of what is left."""

import copy

import torch
from torch import nn

from hf_rtl.modeling.standalone import remove_dead_channels


IMAGES = {"input": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))}


class Function(nn.Module):
    """A module whose `forward(input)` is `function(self, input)`; layers are attributes."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, input):
        return self.function(self, input)


def randomise(model):
    """Sets random statistics, and shifts that lift a channel of zeros above zero, so that it does not look dead."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(-torch.rand(module.running_mean.shape))
            module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 1.0)
    return model.eval()


def without(state, removed):
    """
    `state` without `removed`: module -> (input channels, output channels), or tensor -> dimension -> indices.
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
    """Checks that outputs are equal, up to rounding, in float64 and in float32."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        one, other = copy.deepcopy(model).to(dtype), copy.deepcopy(reference).to(dtype)
        for batch in batches:
            batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
            expected = logits(other, batch)
            assert expected.std() > 0
            assert (logits(one, batch) - expected).abs().max() <= tolerance * expected.abs().max()


def assert_removed(model, removed, *batches, example=IMAGES):
    """Checks that `remove_dead_channels` removes exactly `removed`; see `without`."""
    reference = copy.deepcopy(model)
    report = remove_dead_channels(model, example)
    assert_same_tensors(model.state_dict(), without(reference.state_dict(), removed))
    assert_outputs(model, reference, example, *batches)
    return report
