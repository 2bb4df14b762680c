"""Routed models: one backbone, a bank of masks, and a ticket per route."""

from __future__ import annotations

import contextlib
import copy
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput
from transformers.utils.hub import create_and_tag_model_card

from .active_route import ActiveRoute
from .backbone import build_backbone
from .configuration_rtl import RTLConfig
from .footprint import footprint
from .hub import branch_head, commit_folder
from .mask_bank import MaskBank
from .masking import UNION, WeightMasker, and_masks
from .mixed_batch import group_by_route, merge_outputs, select_samples
from .norm_statistics import BoundStatistics, NormStatistics, is_checkpointing, tracked_buffers
from .prunable import coverage_table, parameter_aliases, parameter_at, select_prunable


_HUB_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "parent_commit",
    "tags",
)


class RTLModel(PreTrainedModel):
    r"""
    A backbone with a bank of masks, one per route. This class wraps a backbone without a head, `RTLModelFor…` with.

    `from_pretrained` of this class returns the class that the model was saved as.

    Args:
        config ([`RTLConfig`]): what to build; the masks keep everything until they are set or loaded.
        backbone (`PreTrainedModel`, *optional*): a built backbone to use instead of one made from
            `config.backbone_config`.

    Which ticket answers is an argument of the call, `route_ids`:
        - an `int` or a name: every sample through that route; -1 is the union of all tickets;
        - a `LongTensor [batch]` or a list of indices and names: each sample through its own, the batch being grouped
          by route once;
        - `None`: inside `route_context`, its route; else, for `ticket_task="membership"`, every ticket scores every
          sample (K forwards), else a `ValueError`, since the router is `"given"`.
    """

    config_class = RTLConfig
    config: RTLConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    # Losses are means over a batch: `Trainer` is not to pass `num_items_in_batch`, which timm models do not take.
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
                f"`ticket_task='membership'` needs a model with one logit a sample; {type(self).__name__} has none. "
                f"Use `ticket_task='labels'`."
            )
        super().__init__(config)
        if backbone is None:
            backbone = self.backbone_class.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        self.backbone = backbone
        self.config.backbone_config = backbone.config
        self.mask_bank = MaskBank(config.prunable, config.route_names)
        per_route = config.norm_statistics == "per_route"
        self.norm_statistics = NormStatistics(backbone, config.num_routes) if per_route else None
        self.masker = WeightMasker(backbone, self.mask_bank, cache_bytes=config.mask_cache_bytes)
        self.main_input_name = backbone.main_input_name
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        self._active = ActiveRoute()
        self._fixed_route: int | None = None
        self.post_init()

    # Building, saving, loading

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedConfig | nn.Module,
        *,
        route_names: Sequence[str],
        ticket_task: str,
        pretrained: bool | None = None,
        seed: int | None = None,
        norm_statistics: str = "per_route",
        prune_include: Sequence[str] = (),
        prune_exclude: Sequence[str] | None = None,
        **backbone_kwargs: Any,
    ) -> RTLModel:
        """
        A routed model over `backbone`, whose masks keep everything.

        Args:
            backbone: a timm name, a repo id, a folder, a configuration or a model; see `backbone.build_backbone`.
            route_names (`Sequence[str]`): one distinct name per route.
            ticket_task (`str`): `"membership"` or `"labels"`, see [`RTLConfig`]. With `membership` the backbone gets
                one logit.
            pretrained (`bool`, *optional*): whether to load weights; by default for repo ids and folders.
            seed (`int`, *optional*): seed of what is initialised afresh.
            norm_statistics (`str`, *optional*, defaults to `"per_route"`): or `"shared"`.
            prune_include (`Sequence[str]`, *optional*): `fnmatch` patterns of weights to add to the default choice.
            prune_exclude (`Sequence[str]`, *optional*): patterns of weights to leave out. Defaults to the backbone's
                own `rtl_prune_exclude`, if it has one.
            **backbone_kwargs: to the backbone, as `num_labels=3` or `in_chans=1`.

        Raises:
            ValueError: arguments that contradict each other, or a pattern that matches nothing.
        """
        built = isinstance(backbone, PreTrainedModel)
        if ticket_task == "membership" and not built:
            if backbone_kwargs.get("num_labels", 1) != 1:
                raise ValueError(
                    f"`num_labels` = {backbone_kwargs['num_labels']} contradicts `ticket_task='membership'`, whose "
                    "tickets have one logit: leave it out, or use `ticket_task='labels'`."
                )
            backbone_kwargs.update(num_labels=1, problem_type="multi_label_classification")
        model = build_backbone(backbone, cls.backbone_class, pretrained=pretrained, seed=seed, **backbone_kwargs)
        if prune_exclude is None:
            prune_exclude = _default_exclude(model)
        config = RTLConfig(
            backbone_config=model.config,
            route_names=list(route_names),
            ticket_task=ticket_task,
            norm_statistics=norm_statistics,
            prunable=select_prunable(model, include=prune_include, exclude=prune_exclude),
            prune_include=list(prune_include),
            prune_exclude=list(prune_exclude),
            dtype=model.dtype,
        )
        return cls(config, backbone=model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any):
        """
        As `PreTrainedModel.from_pretrained`, for a folder or a repo id, and stricter: masks are never made up.

        Raises:
            ValueError: the checkpoint lacks a tensor, its masks are cut short, foreign or damaged, or it was saved as
                another class.
        """
        if cls is RTLModel:
            saved_class = _saved_class(pretrained_model_name_or_path, kwargs)
            if saved_class is not RTLModel:
                return saved_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        # Tensors of other sizes are reported below, by name.
        kwargs["ignore_mismatched_sizes"] = True
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        saved_as = (model.config.architectures or [cls.__name__])[0]
        if saved_as not in [known.__name__ for known in cls.__mro__]:
            raise ValueError(
                f"the checkpoint {str(pretrained_model_name_or_path)!r} was saved as {saved_as}, which {cls.__name__} "
                "is not; RTLModel.from_pretrained opens it as what it is."
            )
        # Anywhere in the name: for timm backbones the loader puts a prefix before names that it does not know.
        own = {"mask_bank", "norm_statistics"}
        foreign = [name for name in info["unexpected_keys"] if own & set(name.split("."))]
        mismatched = [entry[0] for entry in info["mismatched_keys"]]
        problems = {"has wrong sizes of": mismatched, "lacks": info["missing_keys"], "has unknown": foreign}
        for problem, names in problems.items():
            if names:
                listed = ", ".join(sorted(names)[:5])
                raise ValueError(
                    f"the checkpoint {str(pretrained_model_name_or_path)!r} {problem} {len(names)} tensor(s) of this "
                    f"model ({listed}): it is cut short, or saved from another model."
                )
        if model.config.mask_fingerprint is None:
            raise ValueError(
                f"the configuration of {str(pretrained_model_name_or_path)!r} has no `mask_fingerprint`, so its masks "
                "cannot be checked: it was not written by `save_pretrained`."
            )
        model.mask_bank.validate(model.config.mask_fingerprint)
        _align(model)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        As `PreTrainedModel.save_pretrained`: weights, masks and statistics in one safetensors checkpoint.

        Files are written beside the folder and then moved into it one by one, each whole, `config.json` last.
        """
        self._check_savable()
        self.config.mask_fingerprint = self.mask_bank.fingerprint()
        hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        # In the original format a later `load_state_dict`, as `Trainer` does on resume, would miss renamed tensors.
        kwargs.setdefault("save_original_format", False)
        target = Path(save_directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-", suffix=".tmp") as staging:
            super().save_pretrained(staging, **kwargs)
            _move_files(Path(staging), target)
        if push_to_hub:
            if "max_shard_size" in kwargs:
                hub_arguments["max_shard_size"] = kwargs["max_shard_size"]
            self.push_to_hub(hub_arguments.pop("repo_id", target.name), **hub_arguments)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """
        As `PreTrainedModel.push_to_hub`, in one commit, which also removes the weights of an earlier push.

        Args:
            parent_commit (`str`, *optional*): hash of the commit that the branch must still be at. By default the one
                that it is at now, so that of two pushes at the same time the second is refused, and nothing is lost.

        Raises:
            ValueError: the model cannot be saved as it is.
            HfHubHTTPError: the Hub refuses the push, which has changed no branch then.
        """
        self._check_savable()
        repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        head = branch_head(repo_id, None if create_pr else revision, token=token)
        card = create_and_tag_model_card(repo_id, [*(self.model_tags or []), *(tags or [])], token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            card.save(Path(folder) / "README.md")
            return commit_folder(
                Path(folder),
                repo_id,
                parent_commit=parent_commit or head,
                revision=revision,
                token=token,
                create_pr=create_pr,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
            )

    def _check_savable(self) -> None:
        self._refuse_in_context("save_pretrained()")
        if self._fixed_route is not None:
            raise ValueError(
                "this is a view with a fixed route; save the model itself, or `extract_ticket(route)` for a plain one."
            )
        self.config.check()
        if self.config.route_names != self.route_names:
            raise ValueError(
                f"`config.route_names` is {self.config.route_names}, but the mask bank has the routes "
                f"{self.route_names}; change both, or neither."
            )

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

    @contextlib.contextmanager
    def route_context(self, route: int | str, *, fresh: bool = False) -> Iterator[RTLModel]:
        """
        Within the context the backbone is the ticket of `route`: masked weights, and its row of per-route statistics.

        Spans forward *and* backward, as gradient checkpointing needs. The context belongs to the thread that entered
        it: another one waits for its end if the model is in evaluation mode.

        Args:
            route (`int` or `str`): index or name of a route; -1 for the union of all tickets.
            fresh (`bool`, *optional*, defaults to `False`): mask into new tensors, so that a backward may follow after
                the context's end and beside other routes'.

        Raises:
            ValueError: an unknown route.
            RuntimeError: a context is active already in this thread, or in another one while training.
        """
        index = self.route_index(route)
        with self._active.hold(index, wait=not self.training):
            if self.norm_statistics is not None:
                bound = self.norm_statistics.bind(self.backbone, index)
            else:
                bound = BoundStatistics.own(self.backbone)
            try:
                self.masker.apply(index, fresh=fresh)
                self._active.statistics = bound
                yield self
            finally:
                self.masker.remove()
                bound.release()

    @property
    def routes_since_update(self) -> set[int]:
        """Routes that a gradient has flowed through since the last optimizer step or `zero_grad`."""
        return self.masker.routes_since_update

    def update_masks(self) -> list[Tensor]:
        """
        What the next optimizer step may move: the union of the routes trained since the last one, as integers with all
        bits set where kept, in the order of `masker.weights`. Raises `RuntimeError` if no route was trained.
        """
        if not self.routes_since_update:
            raise RuntimeError(
                "no gradient has flowed through a route since the last optimizer step, so no weight may move: call "
                "`model(…, route_ids=route).loss.backward()`, or the same inside `route_context`, before the step."
            )
        return self.masker.masks(sorted(self.routes_since_update))

    def with_route(self, route: int | str) -> RTLModel:
        """
        A light view of this model whose `forward` fixes the route, for pipelines and export. Nothing is copied.

        For `membership` the view's labels are the route's name alone.
        """
        view = copy.copy(self)
        view._fixed_route = self.route_index(route)
        if self.config.ticket_task == "membership":
            name = "union" if view._fixed_route == UNION else self.route_names[view._fixed_route]
            view.config = copy.copy(self.config)
            view.config.id2label, view.config.label2id = {0: name}, {name: 0}
        return view

    @torch.no_grad()
    def extract_ticket(self, route: int | str) -> PreTrainedModel:
        """A new plain backbone holding the masked weights and the statistics of `route`; its outputs are bit-equal."""
        self._refuse_in_context("extract_ticket()")
        index = self.route_index(route)
        ticket = copy.deepcopy(self.backbone)
        aliases = parameter_aliases(ticket)
        for name, mask in zip(self.mask_bank.weight_names, self.masker.masks([index]), strict=True):
            weight = parameter_at(aliases[name][0])
            weight.copy_(and_masks(weight.detach(), mask))
        if self.norm_statistics is not None:
            for (module, name), rows in zip(tracked_buffers(ticket), self.norm_statistics.rows, strict=True):
                module.get_buffer(name).copy_(rows[index])
        return ticket

    # Forward

    def forward(self, *args: Any, labels: Tensor | None = None, route_ids: Any = None, **kwargs: Any):
        """The backbone's output under the masks of `route_ids` (see the class). Positional: the main input."""
        if len(args) > 1:
            raise TypeError(f"forward takes one positional argument, `{self.main_input_name}`, got {len(args)}.")
        if args:
            kwargs[self.main_input_name] = args[0]
        return self._forward_routed(labels, route_ids, **kwargs)

    def _forward_routed(
        self, labels: Tensor | None, route_ids: Any, *, return_dict: bool | None = None, **inputs: Any
    ):
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self._fixed_route is not None:
            if route_ids is not None:
                raise ValueError(f"`route_ids` was given to a view with the fixed route {self._fixed_route}.")
            route_ids = self._fixed_route
        output = self._dispatch(inputs, labels, route_ids)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _dispatch(self, inputs: dict[str, Any], labels: Tensor | None, route_ids: Any) -> ModelOutput:
        active = self._active.route
        if active is not None:
            if route_ids is not None:
                routes = self._routes_of(route_ids, inputs)
                if (set(routes) if isinstance(routes, list) else {routes}) != {active}:
                    raise ValueError(
                        f"`route_ids` = {route_ids} inside the active route_context({active}); leave it out there."
                    )
            return self._run(inputs, labels)
        if route_ids is None:
            if self.config.ticket_task == "membership":
                return self._score_all(inputs, labels)
            raise ValueError(
                "`route_ids` is missing, and the router is 'given', so nobody tells which ticket answers. Pass "
                f"`route_ids=` an index or a name of {', '.join(map(repr, self.route_names))}, or one per sample; a "
                "pipeline, which passes none, takes `model.with_route(route)` as its model."
            )
        if self.training and torch.is_grad_enabled() and is_checkpointing(self.backbone):
            raise RuntimeError(
                "with gradient checkpointing the masks must stay in place until backward has ended: use "
                "`with model.route_context(route): model(…).loss.backward()`, without `route_ids`."
            )
        routes = self._routes_of(route_ids, inputs)
        if isinstance(routes, int):
            with self.route_context(routes, fresh=torch.is_grad_enabled()):
                return self._run(inputs, labels)
        return self._run_mixed(inputs, labels, routes)

    def _run(self, inputs: dict[str, Any], labels: Tensor | None) -> ModelOutput:
        """The backbone on one route's samples, inside a context."""
        if labels is not None:
            inputs = {**inputs, "labels": self.ticket_labels(labels) if self._is_membership else labels}
        recomputes = self.training and torch.is_grad_enabled() and is_checkpointing(self.backbone)
        if recomputes:
            self._active.statistics.attach_to_layers()
        output = self.backbone(**inputs, return_dict=True)
        if recomputes:
            self._active.statistics.detach_from_layers()
        return output

    def _run_mixed(self, inputs: dict[str, Any], labels: Tensor | None, routes: list[int]) -> ModelOutput:
        """Each route's samples as if alone, in the batch's order."""
        if getattr(self.backbone.config, "use_cache", False):
            inputs.setdefault("use_cache", False)
        if labels is not None:
            inputs = {**inputs, "labels": labels}
        groups = group_by_route(routes, self.device)
        if self.training and any(len(positions) == 1 for positions in groups.values()) and self._has_batch_statistics:
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
            sizes.append(self._loss_size(group_labels, len(positions)))
        return type(outputs[0])(**merge_outputs(outputs, list(groups.values()), sizes))

    def _loss_size(self, labels: Tensor | None, num_samples: int) -> Tensor:
        """Terms in the mean loss of a group, up to a factor: its samples, or its labelled tokens or pixels."""
        if labels is None or labels.ndim < 2 or labels.is_floating_point() or self._is_membership:
            return torch.tensor(num_samples)
        counted = labels[:, 1:] if self._shifts_labels else labels
        return (counted != getattr(self.backbone.config, "semantic_loss_ignore_index", -100)).sum()

    def _score_all(self, inputs: dict[str, Any], home_routes: Tensor | None) -> ModelOutput:
        """Every ticket's logit for every sample, `[batch, num_routes]`; the loss is the mean one-vs-rest BCE."""
        if self.training and torch.is_grad_enabled() and is_checkpointing(self.backbone):
            raise RuntimeError("gradient checkpointing needs one route at a time: use `route_context`.")
        columns = []
        for route in range(self.num_routes):
            with self.route_context(route, fresh=torch.is_grad_enabled()):
                output = self._run(inputs, None)
            columns.append(output.logits)
        logits = torch.cat(columns, dim=1)
        loss = None
        if home_routes is not None:
            if home_routes.ndim != 1 or home_routes.is_floating_point():
                raise ValueError(
                    "without `route_ids` the `labels` of membership tickets are home routes, integers [batch], got "
                    f"{home_routes.dtype} {tuple(home_routes.shape)}."
                )
            if ((home_routes < 0) | (home_routes >= self.num_routes)).any():
                raise ValueError(
                    "without `route_ids` the `labels` of membership tickets are home routes, allowed are 0 to "
                    f"{self.num_routes - 1}, got {home_routes.tolist()}."
                )
            targets = one_hot(home_routes.long(), self.num_routes).to(logits.dtype)
            loss = binary_cross_entropy_with_logits(logits, targets)
        return type(output)(loss=loss, logits=logits)

    @property
    def _has_batch_statistics(self) -> bool:
        return any(isinstance(module, _BatchNorm) and module.training for module in self.backbone.modules())

    @property
    def _is_membership(self) -> bool:
        return self.config.ticket_task == "membership"

    def ticket_labels(self, labels: Tensor) -> Tensor:
        """Membership labels 0 or 1, `[batch]` or `[batch, 1]`, as the backbone takes them: floats `[batch, 1]`."""
        if labels.ndim == 1:
            labels = labels.unsqueeze(-1)
        # Values are looked at on the CPU only: elsewhere that would wait for the device, and break a compiled graph.
        look = labels.is_cpu and not torch.compiler.is_compiling()
        if labels.ndim != 2 or labels.shape[1] != 1 or (look and bool(((labels != 0) & (labels != 1)).any())):
            raise ValueError(
                "`labels` of a membership ticket are 0 or 1 per sample, [batch] or [batch, 1] (1: of the route), "
                f"got {tuple(labels.shape)} with values up to {labels.max().item()}. Home routes are the labels of a "
                "call without `route_ids`."
            )
        return labels.to(self.dtype)

    def _routes_of(self, route_ids: Any, inputs: dict[str, Any]) -> int | list[int]:
        """One route for all samples as an `int`, else one per sample."""
        if isinstance(route_ids, str) or not isinstance(route_ids, (Tensor, list, tuple)):
            return self.route_index(route_ids)
        if isinstance(route_ids, Tensor):
            if route_ids.is_floating_point() or route_ids.dtype == torch.bool or route_ids.ndim > 1:
                raise TypeError(
                    f"`route_ids` must be integers [batch], got {route_ids.dtype} {tuple(route_ids.shape)}."
                )
            if route_ids.ndim == 0:
                return self.route_index(int(route_ids))
            route_ids = route_ids.tolist()
        main = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
        if not route_ids:
            raise ValueError("`route_ids` is empty; give one route per sample.")
        if main is not None and len(route_ids) != len(main):
            raise ValueError(
                f"`route_ids` has {len(route_ids)} entries for a batch of {len(main)}; give one per sample."
            )
        return [self.route_index(route) for route in route_ids]

    # What is here

    def prunable_report(self) -> str:
        """A table of the weights that the masks cover, and how many parameters they do not."""
        return coverage_table(self.backbone, self.mask_bank.weight_names)

    def footprint(self) -> dict[str, int]:
        """Bytes of this model in its smallest lossless form, and of one pruned model per route; see `footprint.py`."""
        return footprint(self.backbone, self.mask_bank, self.norm_statistics)

    def status(self) -> dict[str, Any]:
        """Routes with their densities, counts over all tickets, caches and statistics, as plain values."""
        counts, densities = self.mask_bank.count().tolist(), self.mask_bank.density().tolist()
        rows = zip(self.route_names, counts, densities, strict=True)
        return {
            "ticket_task": self.config.ticket_task,
            "routes": [{"name": name, "kept": count, "density": density} for name, count, density in rows],
            "num_prunable": self.mask_bank.num_weights,
            "union": self.mask_bank.union_count(),
            "core": self.mask_bank.core_count(),
            "active_route": self._active.route,
            "norm_statistics": self.config.norm_statistics,
            "mask_cache": {"bytes": self.masker.cached_bytes(), "limit": self.masker.cache_bytes},
            "calibrated": self.config.thresholds is not None,
        }

    # What transformers and torch call

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        self.backbone._set_gradient_checkpointing(enable, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.backbone.get_input_embeddings()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and with them which routes they came from."""
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
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> RTLModel:
        self._refuse_in_context("deepcopy()")
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the backbone initialises itself, and missing masks or statistics are an error, never made up."""

    def _refuse_in_context(self, action: str) -> None:
        if self._active.held:
            raise RuntimeError(f"{action} inside a route_context would see masked weights; leave the context first.")


class RTLModelForImageClassification(RTLModel):
    backbone_class = AutoModelForImageClassification
    supports_membership = True

    def forward(self, pixel_values=None, labels=None, route_ids=None, **kwargs):
        return self._forward_routed(labels, route_ids, pixel_values=pixel_values, **kwargs)


class RTLModelForSemanticSegmentation(RTLModel):
    backbone_class = AutoModelForSemanticSegmentation

    def forward(self, pixel_values=None, labels=None, route_ids=None, **kwargs):
        return self._forward_routed(labels, route_ids, pixel_values=pixel_values, **kwargs)


class RTLModelForAudioClassification(RTLModel):
    backbone_class = AutoModelForAudioClassification
    supports_membership = True

    def forward(self, input_values=None, attention_mask=None, labels=None, route_ids=None, **kwargs):
        return self._forward_routed(
            labels, route_ids, input_values=input_values, attention_mask=attention_mask, **kwargs
        )


class _RTLTextModel(RTLModel):
    main_input_name = "input_ids"

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, route_ids=None, **kwargs):
        return self._forward_routed(
            labels,
            route_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            **kwargs,
        )


class RTLModelForSequenceClassification(_RTLTextModel):
    backbone_class = AutoModelForSequenceClassification
    supports_membership = True


class RTLModelForTokenClassification(_RTLTextModel):
    backbone_class = AutoModelForTokenClassification


class RTLModelForMaskedLM(_RTLTextModel):
    backbone_class = AutoModelForMaskedLM


class RTLModelForCausalLM(_RTLTextModel):
    backbone_class = AutoModelForCausalLM
    _shifts_labels = True


class RTLModelForSeq2SeqLM(_RTLTextModel):
    backbone_class = AutoModelForSeq2SeqLM


TASK_CLASSES = (
    RTLModel,
    RTLModelForImageClassification,
    RTLModelForSemanticSegmentation,
    RTLModelForAudioClassification,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
    RTLModelForMaskedLM,
    RTLModelForCausalLM,
    RTLModelForSeq2SeqLM,
)


def register_auto_classes() -> None:
    """Lets `AutoConfig` and the Auto class of each task build ours for `model_type="rtl"`."""
    AutoConfig.register(RTLConfig.model_type, RTLConfig, exist_ok=True)
    for task_class in TASK_CLASSES:
        task_class.backbone_class.register(RTLConfig, task_class, exist_ok=True)


def _default_exclude(backbone: PreTrainedModel) -> tuple[str, ...]:
    """The patterns that a backbone, or the timm model in it, registers as not to be pruned."""
    own = getattr(backbone, "timm_model", backbone)
    return getattr(own, "rtl_prune_exclude", ())


def _saved_class(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> type[RTLModel]:
    """The task class named by a saved configuration; only our own are looked up."""
    config = kwargs.get("config")
    if config is None:
        names = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
        config = RTLConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})
    classes = {task_class.__name__: task_class for task_class in TASK_CLASSES}
    saved = (config.architectures or [None])[0]
    if saved not in classes:
        raise ValueError(
            f"`architectures` in the configuration of {str(name_or_path)!r} must be one of {', '.join(classes)}, got "
            f"{saved!r}."
        )
    return classes[saved]


def _align(model: nn.Module) -> None:
    """
    Copies the tensors that lie at odd addresses of a mapped file to memory of their own.

    Kernels round differently on memory that is not aligned, and a saved model is to give the outputs that it gave.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_cpu and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _move_files(source: Path, target: Path) -> None:
    """Moves the files of `source` into `target`, `config.json` last; weight files of an earlier save are removed."""
    target.mkdir(exist_ok=True)
    files = sorted(source.iterdir(), key=lambda file: file.name == "config.json")
    written = {file.name for file in files}
    for file in files:
        os.replace(file, target / file.name)
    if any(name.startswith("model") for name in written):
        for stale in target.glob("model*.safetensors*"):
            if stale.name not in written:
                stale.unlink()
