"""What a routed model does with inputs whose route nobody tells: its router decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_rtl import RTLConfig
from .masking import UNION
from .routing import ROUTER_CLASSES, CentroidRouter, RouteDecision, Router


class RouteInference(PreTrainedModel):
    """The part of [`RoutedModel`] that finds routes. `router` is none if the caller is to tell them."""

    config: RTLConfig
    router: Router | None
    route_names: list[str]
    num_routes: int
    route_index: Callable[[int | str], int]
    _refuse_on_view: Callable[[str], None]

    def set_router(self, router: Router | None, *, threshold: float = 0.0, fallback: int | str = UNION) -> None:
        """
        Makes `router` decide the route of inputs that come without one; `None` leaves that to the caller.

        Args:
            router ([`Router`], *optional*): fitted for the routes of this model, as by `RTLTrainer.fit_router`.
            threshold (`float`, *optional*, defaults to 0): where the likeliest route is less probable, the sample
                takes `fallback`.
            fallback (`int` or `str`, *optional*, defaults to -1): a route, or -1 for the union of all tickets.

        Raises:
            TypeError: `router` is neither a [`Router`] nor `None`.
            ValueError: a router for another number of routes or another task, or an unknown `fallback`. Nothing has
                been changed then.
        """
        self._refuse_on_view("set_router()")
        if not (router is None or isinstance(router, Router)):
            raise TypeError(
                f"`router` must be a fitted Router or None, got {router!r}; `RTLTrainer.fit_router(name)` fits one."
            )
        if router is not None and router.num_routes != self.num_routes:
            raise ValueError(
                f"`router` was fitted for {router.num_routes} routes, and this model has {self.num_routes}: "
                f"{', '.join(map(repr, self.route_names))}. Fit one for these with `RTLTrainer.fit_router`."
            )
        index = self.route_index(fallback)
        changed = copy.copy(self.config)
        changed.router = "given" if router is None else router.name
        changed.router_features = router.num_features if isinstance(router, CentroidRouter) else None
        changed.router_threshold = threshold
        changed.router_fallback = None if index == UNION else self.route_names[index]
        changed.check()
        self.config.__dict__.update(changed.__dict__)
        self.router = None if router is None else router.to(self.device)

    def take_router_of(self, config: RTLConfig) -> None:
        """Takes over the router that another configuration of these routes names, to be filled from its file."""
        router = empty_router(config)
        fallback = UNION if config.router_fallback is None else config.router_fallback
        self.set_router(router, threshold=config.router_threshold, fallback=fallback)

    @torch.no_grad()
    def infer_routes(self, **inputs: Any) -> RouteDecision:
        """
        What the model's router decides for a batch: routes, how sure it is, and the scores of all routes. No ticket
        answers. Costs as [`Router`]s say; `inputs` are those of `forward`, without labels.

        Raises:
            ValueError: the router is `"given"`, the model is in training mode, or a batch without samples.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        router = self._require_router()
        check_samples(inputs)
        return self.decide(router.evidence(self, inputs))

    def decide(self, evidence: Tensor) -> RouteDecision:
        """The decision that follows from the router's evidence, `[batch, num_routes]`; see [`Router`]."""
        name = self.config.router_fallback
        fallback = UNION if name is None else self.route_index(name)
        return self._require_router().decide(evidence, threshold=self.config.router_threshold, fallback=fallback)

    def _require_router(self) -> Router:
        if self.router is None:
            raise ValueError(
                "`route_ids` is missing, and the router is 'given', so nobody tells which ticket answers. Pass "
                f"`route_ids=` an index or a name of {', '.join(map(repr, self.route_names))}, or one per sample; a "
                "pipeline, which passes none, takes `model.with_route(route)` as its model. `RTLTrainer.fit_router` "
                "makes a router that decides."
            )
        if self.training:
            raise ValueError(
                "`route_ids` is missing, and routers decide in evaluation mode only: pass `route_ids=`, or call "
                "`model.eval()`."
            )
        return self.router


def first_tensor(inputs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in inputs.values() if isinstance(value, Tensor)), None)


def check_samples(inputs: Mapping[str, Any]) -> None:
    main = first_tensor(inputs)
    if main is not None and main.ndim and not len(main):
        raise ValueError(f"a batch without samples, of shape {tuple(main.shape)}: there is nothing to answer.")


def empty_router(config: RTLConfig) -> Router | None:
    """The router that a configuration names, to be filled from a file."""
    if config.router == "given":
        return None
    arguments = (config.num_routes,) if config.router_features is None else (config.num_routes, config.router_features)
    return ROUTER_CLASSES[config.router](*arguments)


def with_decision(output: ModelOutput, decision: RouteDecision) -> ModelOutput:
    output["route_ids"], output["route_scores"] = decision.route_ids, decision.route_scores
    return output
