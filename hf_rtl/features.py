"""What a backbone computes before its head: one vector a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .prunable import heads


@contextmanager
def recorded_head_inputs(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """
    Collects what the modules of the backbone's head are given in forwards inside the context, in the order of calls.
    Containers are looked through, so the first entry is what the first layer of the head was given.
    """
    recorded: list[Tensor] = []
    parts = (module for head in heads(backbone) for module in head.modules())
    leaves = {id(module): module for module in parts if not any(module.children())}
    handles = [
        leaf.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0])) for leaf in leaves.values()
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def pooled_features(backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """
    The penultimate features of every sample: what the head's first layer is given, of a backbone without a head its
    `pooler_output`, or else its last hidden state. What has positions is averaged over them, over the tokens that
    `attention_mask` has where it has one entry for each.

    Args:
        backbone (`nn.Module`): a transformers model, timm models wrapped.
        inputs (`Mapping[str, Any]`): arguments of its forward, without labels.

    Returns:
        `Tensor`: `float32 [batch, num_features]`.
    """
    with recorded_head_inputs(backbone) as recorded:
        output = backbone(**inputs, return_dict=True)
    if recorded:
        features = recorded[0]
    else:
        pooled = output.get("pooler_output")
        features = output["last_hidden_state"] if pooled is None else pooled
    features = features.float()
    if features.ndim == 2:
        return features
    if features.ndim == 4:  # [batch, channels, height, width]
        return features.mean(dim=(2, 3))
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(dim=1)
    weights = mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
