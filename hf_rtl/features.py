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
    The penultimate features of every sample: the first vector that a layer of the head is given, or else what its
    first layer is given; of a backbone without a head its `pooler_output`, or else its last hidden state; of one that
    generates from what it has encoded, the encoder's. What has positions is averaged over them, over the tokens that
    `attention_mask` has where it has one entry for each.

    Args:
        backbone (`nn.Module`): a transformers model, timm models wrapped.
        inputs (`Mapping[str, Any]`): arguments of its forward, without labels.

    Returns:
        `Tensor`: `float32 [batch, num_features]`.
    """
    features = (_encoded if _generates(backbone) else _before_head)(backbone, inputs).float()
    if features.ndim == 2:
        return features
    if features.ndim == 4:  # [batch, channels, height, width]
        return features.mean(dim=(2, 3))
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(dim=1)
    weights = mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _generates(backbone: Any) -> bool:
    """Whether the backbone is an encoder and a decoder, with no more of a head than the output embeddings."""
    return backbone.config.is_encoder_decoder and all(
        head is backbone.get_output_embeddings() for head in heads(backbone)
    )


def _encoded(backbone: Any, inputs: Mapping[str, Any]) -> Tensor:
    """`[batch, positions, num_features]`; what the decoder is given may not be known before there is an answer."""
    of_encoder = {name: value for name, value in inputs.items() if not name.startswith(("decoder_", "use_cache"))}
    return backbone.get_encoder()(**of_encoder, return_dict=True).last_hidden_state


def _before_head(backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with recorded_head_inputs(backbone) as recorded:
        output = backbone(**inputs, return_dict=True)
    if recorded:
        # A head that averages over positions itself knows which are padding, where samples of audio are masked.
        return next((given for given in recorded if given.ndim == 2), recorded[0])
    pooled = output.get("pooler_output")
    return output["last_hidden_state"] if pooled is None else pooled
