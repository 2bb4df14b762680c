"""Routers with random tensors."""

import torch

from hf_rtl.modeling.routers import Router


def randomised(router: Router) -> Router:
    """The router with random values in all its tensors; the scales are positive."""
    generator = torch.Generator().manual_seed(2)
    for name, buffer in router.named_buffers():
        values = torch.rand(buffer.shape, generator=generator)
        buffer.copy_(0.5 + values if name == "scale" else 2 * values - 1)
    return router
