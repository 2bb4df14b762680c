"""What the layers of a network are given on samples, without padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .experts import are_fused, expert_inputs, fused_matrices, is_stack
from .prunable import parameter_aliases


class LayerInputs:
    """
    Runs a network on batches in evaluation mode, and hands over what the layers of some weights are given.

    Padding is left out: positions that `attention_mask` hides, in a decoder those that `decoder_attention_mask` hides
    or whose label is -100. A layer that is called several times hands over the inputs of every call.

    Args:
        network (`nn.Module`): the network. Afterwards its training flags, statistics and gradients are as before.
        weight_names (`Sequence[str]`): names of weights of linear layers, convolutions and fused experts.
        receive (`Callable`): called with the name of a weight and the input of its layer, `[positions, channels]`, for
            a convolution `[batch, channels, …]`, for fused experts [`ExpertInputs`].

    Raises:
        ValueError: a weight is of none of these, so its layer has no single input.
    """

    def __init__(self, network: nn.Module, weight_names: Iterable[str], receive: Callable[[str, Any], None]) -> None:
        self._network: Any = network
        self._receive = receive
        self._places: list[tuple[str, nn.Module, str]] = []
        aliases = parameter_aliases(network)
        for name in weight_names:
            for module, attribute in aliases[name]:
                fused = are_fused(module) and attribute in fused_matrices(module)
                owner = name.rpartition(".")[0]
                single = attribute == "weight" and not isinstance(module, nn.Embedding)
                if not fused and (not single or is_stack(owner, module, attribute)):
                    raise ValueError(
                        f"{name} is no weight of a linear layer or convolution, nor of fused experts that say how "
                        "they compute, so it has no input to be measured on; "
                        "leave it out with `prune_exclude`, or use `criterion='magnitude'`."
                    )
                self._places.append((name, module, attribute))
        encoder_decoder = bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))
        self._encoder: Any = network.get_encoder() if encoder_decoder else None  # type: ignore[operator]
        decoder: Any = network.get_decoder() if encoder_decoder else None  # type: ignore[operator]
        self._in_decoder = set() if decoder is None else {id(module) for module in decoder.modules()}
        self._encoded: int | None = None
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)

    @torch.no_grad()
    def run(self, batches: Iterable[Mapping[str, Any]], after_batch: Callable[[], None] = lambda: None) -> None:
        """Runs all batches, inputs on the device of the network. Calls `after_batch` after each."""
        flags = [(module, module.training) for module in self._network.modules()]
        self._network.eval()
        hooks: list[Any] = [
            module.register_forward_pre_hook(self._hook(name, attribute), with_kwargs=True)
            for name, module, attribute in self._places
        ]
        if self._encoder is not None:
            hooks.append(self._encoder.register_forward_hook(self._remember_encoded))
        try:
            for inputs in batches:
                self._masks = inputs.get("attention_mask"), _decoder_mask(inputs)
                with contextlib.suppress(_Stop):
                    self._network(**inputs)
                after_batch()
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in flags:
                module.training = training

    def stop(self) -> None:
        """Ends the run of this batch; for `receive`, if nothing else is needed from it."""
        raise _Stop

    def _remember_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output[0].data_ptr()

    def _hook(self, name: str, attribute: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if isinstance(module, _ConvNd):
                return self._receive(name, given[0])
            count = 3 if attribute != "weight" else 1  # experts are given their choice and their shares, too
            own = self._without_padding(module, *given[:count])
            return self._receive(name, expert_inputs(module, attribute, *own) if count == 3 else own[0])

        return hook

    def _without_padding(self, module: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
        """The rows of `x` that are no padding, and the same rows of the others."""
        own_mask, decoder_mask = self._masks
        from_encoder = x.data_ptr() == self._encoded
        mask = decoder_mask if id(module) in self._in_decoder and not from_encoder else own_mask
        if mask is not None and x.ndim == 3 and len(x) == len(mask) and x.shape[1] < mask.shape[1]:
            # Layers of sound models have fewer positions than the samples of their input.
            shorten = getattr(self._network, "_get_feature_vector_attention_mask", None)
            mask = mask if shorten is None else shorten(x.shape[1], mask)
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, *others)]
        if mask is None or mask.ndim != 2 or mask.numel() != len(rows[0]) or x.ndim > 3:
            return rows
        return [tensor[mask.reshape(-1).bool()] for tensor in rows]


class _Stop(Exception):
    pass


def _decoder_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"]
    labels = inputs.get("labels")
    return None if labels is None or labels.ndim != 2 else labels != -100
