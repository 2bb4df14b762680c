"""All kinds of masked optimizers, and the bits of the tensors that they move."""

import torch
from transformers.optimization import Adafactor

from hf_rtl import MaskedAdamW, MaskedSGD, mask_updates


BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}

OPTIMIZERS = {
    "MaskedSGD": lambda model: MaskedSGD(model.parameters(), model, lr=0.1),
    "MaskedSGD-momentum": lambda model: MaskedSGD(model.parameters(), model, lr=0.1, momentum=0.9),
    "MaskedSGD-nesterov": lambda model: MaskedSGD(model.parameters(), model, lr=0.1, momentum=0.9, nesterov=True),
    "MaskedSGD-decay": lambda model: MaskedSGD(model.parameters(), model, lr=0.1, weight_decay=0.1),
    "MaskedSGD-all": lambda model: MaskedSGD(
        model.parameters(), model, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "MaskedAdamW": lambda model: MaskedAdamW(model.parameters(), model, lr=0.01),
    "MaskedAdamW-decay": lambda model: MaskedAdamW(model.parameters(), model, lr=0.01, weight_decay=0.1),
    "SGD": lambda model: mask_updates(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model
    ),
    "AdamW-fused": lambda model: mask_updates(
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True), model
    ),
    "RMSprop": lambda model: mask_updates(
        torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True, weight_decay=0.1), model
    ),
    "Adafactor": lambda model: mask_updates(
        Adafactor(
            model.parameters(), lr=0.01, beta1=0.9, weight_decay=0.1, scale_parameter=False, relative_step=False
        ),
        model,
    ),
}


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 1, 4, 4, generator=generator),
        "labels": torch.randint(2, (size,), generator=generator),
    }


def per_element(optimizer, parameter):
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    }


def bits(tensor):
    return tensor.detach().view(BITS[tensor.dtype])
