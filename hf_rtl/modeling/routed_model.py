"""What a routed model computes: which ticket answers, its masks in place, and the outputs of mixed batches."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .build_backbone import build_described
from .configuration_rtl import RTLConfig
from .mask_bank import MaskBank
from .masking import UNION, ActiveRoute, WeightMasker
from .membership import one_versus_rest_loss, ticket_labels
from .mixed_batch import (
    batch_device,
    check_samples,
    count,
    group_by_route,
    merge_outputs,
    num_loss_terms,
    read_route_ids,
    select_samples,
)
from .norm_statistics import BoundStatistics, NormStatistics
from .offloading import refuse_offloaded, refuse_offloaded_buffers, standing_in
from .private_parameters import PrivateParameters, select_private
from .routers import CentroidRouter, RouteDecision, Router, ScoreRouter, empty_router, with_decision
from .structure import check_resizing, check_structure, shared_tensors
from .ticket_cache import CachedTicket, TicketCache


logger = logging.getLogger(__name__)


class RoutedModel(PreTrainedModel):
    """
    The part of [`RTLModel`] that computes. `RTLModel` adds building, saving and sharing, and has the documentation.
    """

    config_class = RTLConfig
    config: RTLConfig
    router: Router | None
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    # Losses are means over a batch: `Trainer` must not pass `num_items_in_batch`, which timm models do not take.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    backbone_class: Any = AutoModel
    supports_membership = False
    # Whether the loss compares the output at a position with the label at the next, so that the first one is left out.
    _shifts_labels = False

    def __init__(self, config: RTLConfig, backbone: PreTrainedModel | None = None) -> None:
        config.check()
        if config.ticket_task == "membership" and not self.supports_membership:
            raise ValueError(
                f"`ticket_task='membership'` needs a model with one logit per sample; {type(self).__name__} has none. "
                f"Use `ticket_task='labels'`."
            )
        super().__init__(config)
        if backbone is None:
            if type(config.backbone_config) not in self.backbone_class._model_mapping:
                raise ValueError(
                    f"the model was saved as {(config.architectures or ['another class'])[0]}, which "
                    f"{type(self).__name__} is not; `RTLModel.from_pretrained` opens it as what it is."
                )
            backbone = build_described(config.backbone_config, self.backbone_class, len(config.prunable))
        self.backbone = backbone
        self.config.backbone_config = backbone.config
        self.mask_bank = MaskBank(config.prunable, config.route_names)
        per_route = config.norm_statistics == "per_route"
        self.norm_statistics = NormStatistics(backbone, config.num_routes) if per_route else None
        private = select_private(backbone, config.private_parameters, self.mask_bank.weight_names)
        self.private_parameters = PrivateParameters(backbone, private, config.num_routes)
        self.router = empty_router(config)
        self.masker = WeightMasker(backbone, self.mask_bank, cache_bytes=config.mask_cache_bytes)
        self.main_input_name = backbone.main_input_name
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        self.active = ActiveRoute()
        self.tickets = TicketCache()
        self._fixed_route: int | str | None = None
        self.post_init()
        # transformers saves a tensor with several names only if it is declared to be tied.
        self._tied_weights_keys = shared_tensors(self, chain.from_iterable(self.all_tied_weights_keys.items()))

    # Routes

    @property
    def route_names(self) -> list[str]:
        return self.mask_bank.route_names

    @property
    def num_routes(self) -> int:
        return self.mask_bank.num_routes

    def route_index(self, route: int | str) -> int:
        """Index of a route given by name or index; -1, the union of all tickets, is its own index."""
        with contextlib.suppress(TypeError):
            if operator.index(route) == UNION:  # type: ignore[arg-type]
                return UNION
        return self.mask_bank.route_index(route)

    def route_name(self, index: int) -> str:
        """The name of a route given by index; `"union"` for -1."""
        return "union" if index == UNION else self.route_names[index]

    @torch.no_grad()
    def append_ticket(
        self,
        name: str,
        masks: Sequence[Tensor],
        *,
        statistics: Sequence[Tensor] = (),
        private_parameters: Mapping[str, Tensor] | None = None,
        threshold: float | None = None,
        brings_weights: bool = False,
    ) -> None:
        """
        Adds a route with its ticket, whose weights are those of the model.

        Args:
            name (`str`): of the new route, which becomes the last one.
            masks (`Sequence[Tensor]`): `bool`, one per prunable weight, of its shape.
            statistics (`Sequence[Tensor]`): the route's row of running statistics, one tensor per buffer of
                `norm_statistics`. Those of the union do not change.
            private_parameters (`Mapping[str, Tensor]`, *optional*): the route's row of private parameters, by name in
                the backbone; by default the backbone's own. Parameters that were shared so far become private, and the
                other routes keep the shared values.
            threshold (`float`, *optional*): of a calibrated membership ticket; by default 0 if others are calibrated.
            brings_weights (`bool`, *optional*, defaults to `False`): whether it keeps weights that the base lacks. The
                base stays what it was without them.

        Raises:
            ValueError: the name is taken, or a mask, the statistics or a private parameter do not fit. Nothing is
                changed then.
        """
        self._refuse_change("append_ticket()")
        refuse_offloaded(self, "append_ticket()")
        self.mask_bank.check_masks(masks)
        rows = [] if self.norm_statistics is None else self.norm_statistics.row(UNION)
        expected, found = ([tuple(tensor.shape) for tensor in tensors] for tensors in (rows, statistics))
        if found != expected:
            raise ValueError(
                f"`statistics` has tensors of shapes {found}, expected {expected}: the row of a route, such as "
                "`model.norm_statistics.row(0)`, or nothing if all routes share statistics."
            )
        row = dict(private_parameters or {})
        self._check_private_row(row)
        thresholds = self.config.thresholds
        if thresholds is not None or threshold is not None:
            thresholds = [*(thresholds or [0.0] * self.num_routes), threshold or 0.0]
        self.config.change_routes([*self.route_names, name], thresholds)
        if brings_weights:
            self.config.added_routes = [*self.config.added_routes, name]
        self.mask_bank.add_route(name, masks)
        if self.norm_statistics is not None:
            self.norm_statistics.insert(statistics)
        self.make_private(list(row))
        self.private_parameters.insert(self.backbone, row)
        if self.router is not None:
            logger.warning(
                f"the router {self.router.name!r} does not know the new route {name!r} and is removed; fit it again "
                "with `RTLTrainer.fit_router`, or pass `route_ids`."
            )
            self.set_router(None)

    def make_private(self, names: Sequence[str]) -> None:
        """
        Makes shared parameters private; every route starts from the shared values.

        Args:
            names (`Sequence[str]`): in the backbone, or `fnmatch` patterns; see `private_parameters` of [`RTLConfig`].

        Raises:
            ValueError: a pattern that matches nothing, a prunable weight or a tied parameter. Nothing is changed then.
        """
        self._refuse_change("make_private()")
        refuse_offloaded(self, "make_private()")
        chosen = select_private(self.backbone, names, self.mask_bank.weight_names)
        if not set(chosen) <= set(self.private_parameters.names):
            self.config.private_parameters = [*self.config.private_parameters, *names]
            self.private_parameters.extend(self.backbone, chosen)

    def _check_private_row(self, row: Mapping[str, Tensor]) -> None:
        self.private_parameters.own(self.backbone)
        names = select_private(self.backbone, list(row), self.mask_bank.weight_names)
        for name in names:
            expected, found = self.backbone.get_parameter(name).shape, row[name].shape
            if found != expected:
                raise ValueError(f"`private_parameters` has {name!r} {tuple(found)}, expected {tuple(expected)}.")

    def drop_route(self, route: int | str) -> None:
        """
        Removes a route with its ticket; later routes move up by one. Weights stay, also those that no other ticket
        keeps.

        Raises:
            ValueError: an unknown route, or too few routes would be left.
        """
        self._refuse_change("drop_route()")
        index = self.mask_bank.route_index(route)
        thresholds = self.config.thresholds
        if thresholds is not None:
            thresholds = [*thresholds[:index], *thresholds[index + 1 :]]
        self.config.change_routes([name for name in self.route_names if name != self.route_names[index]], thresholds)
        self.mask_bank.drop_route(index)
        if self.norm_statistics is not None:
            self.norm_statistics.drop_route(index)
        self.private_parameters.drop(index)
        if self.router is not None:
            self.router.drop_route(index)

    # Inputs without a given route

    def set_router(self, router: Router | None, *, threshold: float = 0.0, fallback: int | str = UNION) -> None:
        """
        Makes `router` decide the route of inputs without a given one; with `None` the caller must give it.

        Args:
            router ([`Router`], *optional*): fitted for the routes of this model, as by `RTLTrainer.fit_router`.
            threshold (`float`, *optional*, defaults to 0): a sample takes `fallback` if its likeliest route is less
                probable than this.
            fallback (`int` or `str`, *optional*, defaults to -1): a route, or -1 for the union of all tickets.

        Raises:
            TypeError: `router` is neither a [`Router`] nor `None`.
            ValueError: a router for another number of routes or another task, or an unknown `fallback`. Nothing is
                changed then.
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
        changed = self.config.draft()
        changed.router = "given" if router is None else router.name
        changed.router_features = router.num_features if isinstance(router, CentroidRouter) else None
        changed.router_threshold = threshold
        changed.router_fallback = None if index == UNION else self.route_names[index]
        changed.check()
        self.config.__dict__.update(changed.__dict__)
        # Not `self.device`, which is "meta" where weights are offloaded.
        self.router = None if router is None else router.to(self.mask_bank.packed[0].device)

    def load_router_from_config(self, config: RTLConfig) -> None:
        """Sets the router that another configuration of these routes names, whose buffers a file will fill."""
        fallback = config.router_fallback or UNION
        self.set_router(empty_router(config), threshold=config.router_threshold, fallback=fallback)

    @torch.no_grad()
    def infer_routes(self, **inputs: Any) -> RouteDecision:
        """
        The decision of the model's router for a batch: routes, their probabilities, and the scores of all routes. No
        ticket answers. Each [`Router`] says what it costs. `inputs` are those of `forward`, without labels.

        Raises:
            ValueError: the router is `"given"`, the model is in training mode, or the batch has no samples.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        router = self._require_router()
        check_samples(inputs)
        return self.decide(router.evidence(self, inputs))

    def decide(self, evidence: Tensor) -> RouteDecision:
        """The decision that follows from the router's evidence, `[batch, num_routes]`. Raises as `infer_routes`."""
        fallback = self.route_index(self.config.router_fallback or UNION)
        return self._require_router().decide(evidence, threshold=self.config.router_threshold, fallback=fallback)

    def _require_router(self) -> Router:
        if self.router is None:
            first = self.route_names[0]
            raise ValueError(
                "`route_ids` is missing, and no router was fitted. Say which ticket answers: "
                f"`route_ids={first!r}`, of {', '.join(map(repr, self.route_names))}, or one per sample. Pipelines of "
                "`hf_rtl.routed_pipeline` take it too; others, except that for text generation, need a view, "
                f"`pipeline(task, model=model.with_route({first!r}), …)`. `RTLTrainer.fit_router` makes a router."
            )
        if self.training:
            raise ValueError(
                "`route_ids` is missing, and routers decide in evaluation mode only: pass `route_ids=`, or call "
                "`model.eval()`."
            )
        return self.router

    # Masks in place

    def make_small_ticket(self, index: int) -> PreTrainedModel:
        """The ticket of a route as a plain model, without the units that it does not use."""
        raise NotImplementedError

    @contextlib.contextmanager
    def route_context(self, route: int | str, *, fresh: bool = False) -> Iterator[RoutedModel]:
        """
        Within the context the backbone is the ticket of `route`: masked weights, its rows of private parameters and of
        per-route statistics.

        It may span forward *and* backward, as gradient checkpointing needs. The context belongs to the thread that
        entered it; in evaluation mode, other threads wait for its end.

        Args:
            route (`int` or `str`): index or name of a route; -1 for the union of all tickets.
            fresh (`bool`, *optional*, defaults to `False`): mask into new tensors, so that a backward may follow after
                the context's end and beside other routes'.

        Raises:
            ValueError: an unknown route.
            RuntimeError: a context is active already in this thread, or in another one while training; or training
                while weights are offloaded.
        """
        index = self.route_index(route)
        with self.active.hold(index, wait=not self.training):
            self.masker.locate()
            if self.training and torch.is_grad_enabled() and self.masker.tree.is_offloaded:
                refuse_offloaded(self, "training")
            ticket = None if fresh or torch.is_grad_enabled() else self._cached_ticket(index)
            masked = self._weights_in_place(index, lambda: self.masker.apply(index, fresh=fresh))
            with masked if ticket is None else ticket.in_place():
                yield self

    @contextlib.contextmanager
    def mixture_context(self) -> Iterator[list[Tensor]]:
        """
        As `route_context`, with the mean of all masks and the statistics of the union. Yields the weights in place,
        in the mask bank's order; they require gradients.
        """
        refuse_offloaded(self, "the mean of all masks, which the router 'entropy' differentiates,")
        with self.active.hold(UNION, wait=not self.training):
            self.masker.locate()
            with self._weights_in_place(UNION, self.masker.apply_mean) as weights:
                yield weights

    def _cached_ticket(self, index: int) -> CachedTicket | None:
        """The ticket from the cache; `None` in training, where weights and statistics change, or where offloaded."""
        if self.training or any(layer.training for layer in self.masker.tree.tracking_layers):
            return None
        return self.tickets.get(self, index)

    @contextlib.contextmanager
    def _weights_in_place(self, index: int, mask: Callable[[], Sequence[Tensor]]) -> Iterator[Any]:
        """The caller holds the active route, and has located the weights."""
        if self.training:
            self.tickets.clear()
        tree = self.masker.tree
        refuse_offloaded_buffers([*self.mask_bank.packed, *tree.statistics()])
        bound = BoundStatistics(tree.tracked_buffers, self.norm_statistics, index)
        try:
            weights = mask()
            on_backward = partial(self.routes_since_update.add, index)
            rows = self.private_parameters.stand_ins(tree.named_modules, index, on_backward)
            self.active.statistics = bound
            with standing_in(self.backbone, [*self.masker.stand_ins(weights, index), *rows]):
                yield weights
        finally:
            bound.release()

    @property
    def routes_since_update(self) -> set[int]:
        """Routes that a gradient has flowed through since the last optimizer step or `zero_grad`."""
        return self.masker.routes_since_update

    @property
    def masked_parameters(self) -> list[nn.Parameter]:
        """The parameters that a route's step moves in part: prunable weights, then rows of private parameters."""
        return [*self.masker.weights, *self.private_parameters.rows]

    def update_masks(self) -> list[Tensor]:
        """
        What the next optimizer step may move: the union of the routes trained since the last one, as integers with all
        bits set where kept, in the order of `masked_parameters`. Raises `RuntimeError` if no route was trained.
        """
        if not self.routes_since_update:
            raise RuntimeError(
                "no gradient has flowed through a route since the last optimizer step, so no weight may move: call "
                "`model(…, route_ids=route).loss.backward()`, or the same inside `route_context`, before the step."
            )
        routes = sorted(self.routes_since_update)
        return [*self.masker.masks(routes), *self.private_parameters.masks(routes)]

    def with_route(self, route: int | str) -> RoutedModel:
        """
        A light view of this model that fixes the route of its calls, for pipelines. Nothing is copied. To export a
        ticket, extract it: `extract_ticket(route)`.

        For `membership` the view's labels are the route's name alone.
        """
        view = copy.copy(self)
        index = self.route_index(route)
        # By name, since routes move up when an earlier one is dropped.
        view._fixed_route = UNION if index == UNION else self.route_names[index]
        if self.config.ticket_task == "membership":
            name = self.route_name(index)
            view.config = self.config.draft()
            view.config.id2label, view.config.label2id = {0: name}, {name: 0}
        return view

    # Forward

    def forward(self, *args: Any, labels: Tensor | None = None, route_ids: Any = None, **kwargs: Any):
        """The output under the masks of `route_ids`. Raises `TypeError` if more than the main input is positional."""
        if len(args) > 1:
            raise TypeError(f"forward takes one positional argument, `{self.main_input_name}`, got {len(args)}.")
        if args:
            kwargs[self.main_input_name] = args[0]
        return self._forward_routed(labels, route_ids, **kwargs)

    def _forward_routed(
        self, labels: Tensor | None, route_ids: Any, *, return_dict: bool | None = None, **inputs: Any
    ):
        inputs = {name: value for name, value in inputs.items() if value is not None}
        output = self._dispatch(inputs, labels, self._resolve_route_ids(route_ids))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _resolve_route_ids(self, route_ids: Any) -> Any:
        """The `route_ids` of the call, or the fixed route of a view."""
        if self._fixed_route is None:
            return route_ids
        if route_ids is not None:
            raise ValueError(f"`route_ids` was given to a view with the fixed route {self._fixed_route!r}.")
        return self._fixed_route

    def _is_in_place(self, route_ids: Any, inputs: dict[str, Any]) -> bool:
        """Whether the call is inside a context of this thread. There, `route_ids` must not name another route."""
        active = self.active.route
        if active is not None and route_ids is not None:
            routes = read_route_ids(route_ids, inputs, self.route_index)
            if (set(routes) if isinstance(routes, list) else {routes}) != {active}:
                raise ValueError(
                    f"`route_ids` = {route_ids} inside the active route_context({active}); leave it out there."
                )
        return active is not None

    def _dispatch(self, inputs: dict[str, Any], labels: Tensor | None, route_ids: Any) -> ModelOutput:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "a routed model cannot be exported or traced, since masks are put in place around a call. Export the "
                "plain model of a ticket, `model.extract_ticket(route)`."
            )
        check_samples(inputs)
        if self._is_in_place(route_ids, inputs):
            return self._run(inputs, labels)
        if route_ids is None and not self._is_membership:
            decision = self.infer_routes(**inputs)
            return with_decision(self._run_mixed(inputs, labels, decision.route_ids.tolist()), decision)
        if self._recomputes:
            raise RuntimeError(
                "with gradient checkpointing the masks must stay in place until backward has ended: use "
                "`with model.route_context(route): model(…).loss.backward()`, without `route_ids`."
            )
        if route_ids is None:
            return self._score_all(inputs, labels)
        routes = read_route_ids(route_ids, inputs, self.route_index)
        if isinstance(routes, int):
            with self.route_context(routes, fresh=torch.is_grad_enabled()):
                return self._run(inputs, labels)
        return self._run_mixed(inputs, labels, routes)

    def _run(self, inputs: dict[str, Any], labels: Tensor | None) -> ModelOutput:
        """The backbone on one route's samples, inside a context."""
        if labels is not None:
            inputs = {**inputs, "labels": self.ticket_labels(labels) if self._is_membership else labels}
        recomputes = self._recomputes
        if recomputes:
            self.active.statistics.attach_to_layers()
        output = self.backbone(**inputs, return_dict=True)
        if recomputes:
            self.active.statistics.detach_from_layers()
        return output

    def _run_mixed(self, inputs: dict[str, Any], labels: Tensor | None, routes: list[int]) -> ModelOutput:
        """Runs each route's samples separately, and returns outputs in the batch's order."""
        # Parts of a backbone, such as a decoder, may have copies of its configuration.
        modules = list(self.backbone.modules())
        parts = [module for module in modules if isinstance(module, PreTrainedModel)]
        if any(getattr(part.config, "use_cache", False) for part in parts):
            inputs.setdefault("use_cache", False)
        if labels is not None:
            inputs = {**inputs, "labels": labels}
        groups = group_by_route(routes, batch_device(inputs))
        alone = self.training and any(count(positions) == 1 for positions in groups.values())
        if alone and any(isinstance(module, _BatchNorm) and module.training for module in modules):
            raise ValueError(
                "a route has a single sample in this training batch, and batch normalisation needs two: batch the "
                "samples of a route together, or call `model.eval()`."
            )
        outputs, sizes = [], []
        for route, positions in groups.items():
            samples = select_samples(inputs, positions, len(routes))
            group_labels = samples.pop("labels", None)
            with self.route_context(route, fresh=torch.is_grad_enabled()):
                outputs.append(self._run(samples, group_labels))
            sizes.append(self._loss_size(group_labels, count(positions)))
        return type(outputs[0])(**merge_outputs(outputs, list(groups.values()), sizes))

    def _loss_size(self, labels: Tensor | None, num_samples: int) -> Tensor:
        ignored = getattr(self.backbone.config, "semantic_loss_ignore_index", -100)
        labels = None if self._is_membership else labels
        return num_loss_terms(labels, num_samples, ignored=ignored, shifted=self._shifts_labels)

    def _score_all(self, inputs: dict[str, Any], home_routes: Tensor | None) -> ModelOutput:
        """Every ticket's logit for every sample, `[batch, num_routes]`; the loss is the mean one-vs-rest BCE."""
        columns = []
        for route in range(self.num_routes):
            with self.route_context(route, fresh=torch.is_grad_enabled()):
                output = self._run(inputs, None)
            columns.append(output.logits)
        logits = torch.cat(columns, dim=1)
        loss = None if home_routes is None else one_versus_rest_loss(logits, home_routes)
        output = type(output)(loss=loss, logits=logits)
        if self.router is None or self.training:
            return output
        if isinstance(self.router, ScoreRouter):
            return with_decision(output, self.decide(logits.detach().float()))
        return with_decision(output, self.infer_routes(**inputs))

    @property
    def _recomputes(self) -> bool:
        """Whether the backward of this forward runs parts of it again."""
        return self.training and torch.is_grad_enabled() and self.masker.tree.is_checkpointing()

    @property
    def _is_membership(self) -> bool:
        return self.config.ticket_task == "membership"

    def ticket_labels(self, labels: Tensor) -> Tensor:
        """Membership labels, 0 or 1, `[batch]` or `[batch, 1]`, as floats `[batch, 1]`. `ValueError` for others."""
        return ticket_labels(labels, self.dtype)

    # What transformers and torch call

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        self.backbone._set_gradient_checkpointing(enable, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As `PreTrainedModel.resize_token_embeddings`, for the vocabulary that all tickets share.

        Raises:
            ValueError: masks cover the embeddings, or every route has its own copy. Nothing is changed then.
        """
        self._refuse_change("resize_token_embeddings()")
        with torch.device("meta"):
            resized = self.backbone_class.from_config(copy.deepcopy(self.config.backbone_config))
            resized.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing=False)
        check_resizing(self.backbone, resized, self.mask_bank.weight_names, self.private_parameters.names)
        return self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients and the record of the routes that they came from."""
        super().zero_grad(set_to_none)
        self.routes_since_update.clear()

    def state_dict(self, *args: Any, **kwargs: Any):
        self._refuse_in_context("state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any):
        self._refuse_in_context("load_state_dict()")
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True):
        self._refuse_in_context("moving or casting the model")
        self.masker.forget()
        self.tickets.clear()
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedModel:
        self._refuse_in_context("deepcopy()")
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the backbone initialises itself, and missing masks or statistics are an error."""

    def check_savable(self) -> None:
        """Raises `ValueError` or `RuntimeError` unless a saved copy could be loaded."""
        self._refuse_change("save_pretrained()")
        refuse_offloaded(self, "saving")
        self.masker.locate()
        self.private_parameters.own(self.backbone)
        self.config.check()
        if self.config.route_names != self.route_names:
            raise ValueError(
                f"`config.route_names` is {self.config.route_names}, but the mask bank has the routes "
                f"{self.route_names}; change both, or neither."
            )
        router = "given" if self.router is None else self.router.name
        if self.config.router != router:
            raise ValueError(
                f"`config.router` is {self.config.router!r}, but the model's router is {router!r}; change it by "
                "`set_router`."
            )
        with torch.device("meta"):
            built = type(self)(copy.deepcopy(self.config))
        remedy = "Set the fields of `model.config` that describe the model, such as `num_labels`, or undo the change."
        check_structure(self, built, remedy)

    def _refuse_change(self, action: str) -> None:
        self._refuse_in_context(action)
        self._refuse_on_view(action)

    def _refuse_on_view(self, action: str) -> None:
        if self._fixed_route is not None:
            raise ValueError(
                f"{action} is not allowed on a view with a fixed route; call it on the model itself. "
                "`extract_ticket(route)` makes a plain model of one ticket."
            )

    def _refuse_in_context(self, action: str) -> None:
        if self.active.held:
            raise RuntimeError(f"{action} inside a route_context would see masked weights; leave the context first.")
