"""
Routers decide which route an input takes when the caller does not say. They see inputs, never labels.

`router_fitting.py` fits them, on training data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_rtl import RTLConfig
from .masking import UNION
from .prunable import heads
from .route_rows import RouteRows


class RouteDecision(NamedTuple):
    """
    What a router decides for a batch.

    Args:
        route_ids (`Tensor`): `int64 [batch]`, the route that each sample takes.
        confidence (`Tensor`): `float32 [batch]`, the probability of the likeliest route.
        route_scores (`Tensor`): `float32 [batch, num_routes]`, the log probability of every route.
    """

    route_ids: Tensor
    confidence: Tensor
    route_scores: Tensor


class Router(RouteRows):
    """
    Turns evidence for every route into a decision: the probabilities of the routes are
    softmax(scale · evidence + offset), with a scale and an offset per route, fitted on samples whose route is known.

    Where the likeliest route is less probable than `threshold`, the sample takes `fallback` instead.

    Args:
        num_routes (`int`): K.

    Buffers, `float32` also in a model of another type: `scale` and `offset`, `[num_routes]`.
    """

    name: str
    scale: Tensor
    offset: Tensor

    def __init__(self, num_routes: int) -> None:
        super().__init__()
        # The type is explicit, since `from_pretrained` builds models under the requested default type.
        self.register_buffer("scale", torch.ones(num_routes, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros(num_routes, dtype=torch.float32))

    @property
    def num_routes(self) -> int:
        return len(self.scale)

    def evidence(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """
        Evidence for every route, `float32 [batch, num_routes]`, more for a likelier one. `model` is a routed model in
        evaluation mode. Raises `ValueError` if its outputs or features are not those that the router reads.
        """
        raise NotImplementedError

    def decide(self, evidence: Tensor, *, threshold: float = 0.0, fallback: int = UNION) -> RouteDecision:
        scores = (self.scale * evidence + self.offset).log_softmax(dim=1)
        log_confidence, route_ids = scores.max(dim=1)
        confidence = log_confidence.exp()
        return RouteDecision(torch.where(confidence < threshold, fallback, route_ids), confidence, scores)


class ScoreRouter(Router):
    """
    Every ticket scores every sample, in K forwards. The evidence is the ticket's logit, or for `labels` tickets the
    log-sum-exp of its logits.
    """

    name = "score"

    def evidence(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        columns = []
        for route in range(model.num_routes):
            with model.route_context(route):
                logits = _one_prediction_a_sample(model.backbone(**inputs, return_dict=True))
            columns.append(logits.float().logsumexp(dim=1))  # for one logit, the logit itself
        return torch.stack(columns, dim=1)


class CentroidRouter(Router):
    """
    The nearest mean of a route in the penultimate features of the union of all tickets, in one forward. The distance
    is Mahalanobis', in units of how features vary within a route: otherwise the differences that the task is about
    would hide those between routes. The evidence is minus half the squared distance, without the terms that all routes
    share, so it is linear in the features.

    Buffers: also `directions`, `float32 [num_routes, num_features]`, and `bias`, `float32 [num_routes]`.
    """

    name = "centroid"
    directions: Tensor
    bias: Tensor

    def __init__(self, num_routes: int, num_features: int) -> None:
        super().__init__(num_routes)
        self.register_buffer("directions", torch.zeros(num_routes, num_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_routes, dtype=torch.float32))

    @property
    def num_features(self) -> int:
        return self.directions.shape[1]

    def evidence(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), model.route_context(UNION):
            features = pooled_features(model.backbone, inputs)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"this router was fitted for another backbone: it knows {self.num_features} features, and there are "
                f"{features.shape[1]}."
            )
        return nn.functional.linear(features, self.directions, self.bias)


class EntropyRouter(Router):
    """
    One gradient step over mixing coefficients (Wortsman et al., "Supermasks in superposition", 2020, section 3.3), in
    one forward and one backward. Under the mean of all masks, the evidence for a route is how fast the entropy of the
    output falls with the coefficient of its mask. The whole batch gets one decision, so it must be of one route.
    """

    name = "entropy"

    def evidence(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        # Inputs are cloned, since those made in inference mode cannot be saved for a backward.
        with torch.inference_mode(False), torch.enable_grad(), model.mixture_context() as weights:
            inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            logits = _one_prediction_a_sample(model.backbone(**inputs, return_dict=True)).float()
            entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
            gradients = torch.autograd.grad(entropy, weights, allow_unused=True)
        return -model.masker.along_masks(gradients).expand(len(logits), -1)


ROUTER_CLASSES: dict[str, type[Router]] = {
    router.name: router for router in (ScoreRouter, CentroidRouter, EntropyRouter)
}


def _one_prediction_a_sample(output: Mapping[str, Any]) -> Tensor:
    logits = output.get("logits")
    if logits is None or logits.ndim != 2:
        raise ValueError(
            "this router reads one prediction per sample, logits [batch, num_labels], got "
            f"{'none' if logits is None else tuple(logits.shape)}; use the router 'centroid'."
        )
    return logits


def pooled_features(backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """
    The penultimate features of every sample: the first vector that is the input of a layer in the head, or else the
    input of its first layer. For a backbone without a head they are its `pooler_output`, or else its last hidden
    state; for one that generates from an encoder's output, the encoder's. Features with positions are averaged over
    these, only over the tokens in `attention_mask` if it has an entry for each.

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
    """Whether the backbone is an encoder and a decoder, whose head is only the output embeddings."""
    return backbone.config.is_encoder_decoder and all(
        head is backbone.get_output_embeddings() for head in heads(backbone)
    )


def _encoded(backbone: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The encoder's output, `[batch, positions, num_features]`: the decoder's input may be unknown before routing."""
    encoder_inputs = {name: value for name, value in inputs.items() if not name.startswith(("decoder_", "use_cache"))}
    return backbone.get_encoder()(**encoder_inputs, return_dict=True).last_hidden_state


def _before_head(backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    recorded: list[Tensor] = []  # inputs of the layers in the head, in the order of calls
    parts = {module for head in heads(backbone) for module in head.modules() if not any(module.children())}
    handles = [part.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0])) for part in parts]
    try:
        output = backbone(**inputs, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    if recorded:
        # A head that averages over positions itself knows which are padding, also if the mask is of audio samples.
        return next((given for given in recorded if given.ndim == 2), recorded[0])
    pooled = output.get("pooler_output")
    return output["last_hidden_state"] if pooled is None else pooled


def empty_router(config: RTLConfig) -> Router | None:
    """The router that a configuration names, whose buffers a file will fill."""
    if config.router == "given":
        return None
    arguments = (config.num_routes,) if config.router_features is None else (config.num_routes, config.router_features)
    return ROUTER_CLASSES[config.router](*arguments)


def with_decision(output: ModelOutput, decision: RouteDecision) -> ModelOutput:
    output["route_ids"], output["route_scores"] = decision.route_ids, decision.route_scores
    return output
