"""Routed models: one backbone, a bank of masks, and a ticket per route."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from .build_backbone import build_backbone, check_buildable
from .computed_weights import changed_weights_report, warn_of_changed_weights
from .configuration_rtl import RTLConfig
from .files import written_whole
from .footprint import footprint
from .generation import RoutedGenerationMixin
from .hub import MODEL_FILES, TICKET_FILES, push, read_card, save_code, write_model_card, write_tickets_page
from .image_processing import savable_processor, warn_of_unfitting_processor
from .mask_bank import check_route_names
from .model_file import align, check_class, check_index, check_loaded, check_sizes, compact_state, expand_state
from .offloading import refuse_offloaded, refuse_offloaded_buffers
from .prunable import coverage_table, select_prunable, warn_of_low_coverage
from .routed_model import RoutedModel
from .small_ticket import refit_ticket, remove_units
from .standalone import extract_ticket
from .ticket_files import base_fingerprint, load_tickets, read_index, save_tickets
from .units import UnitLayer, find_units


class RTLModel(RoutedModel):
    r"""
    A backbone with a bank of masks, one per route. This class wraps a backbone without a head, `RTLModelFor…` one with
    a head. `from_pretrained` of this class returns the class that the model was saved as.

    Args:
        config ([`RTLConfig`]): what to build; the masks keep everything until they are set or loaded.
        backbone (`PreTrainedModel`, *optional*): a built backbone to use instead of one made from
            `config.backbone_config`.

    The argument `route_ids` of a call decides which ticket answers:
        - an `int` or a name: every sample through that route; -1 is the union of all tickets;
        - a `LongTensor [batch]` or a list of indices and names: each sample through its own route, grouped by route;
        - `None`: inside `route_context`, its route; else, for `ticket_task="membership"`, every ticket scores every
          sample (K forwards); else the router decides, in evaluation mode (see `routers.py`). `ValueError` if the
          router is `"given"`.
    """

    # After a training: what a model card says about the run (see `run_record.py`).
    training_run: dict[str, Any] | None = None
    # After a training: the rule by which new data gets its routes (see `partition.Rule`).
    partition_rule: Any = None
    _unit_layers: list[UnitLayer] | None = None
    # Whether a trainer has moved its weights.
    was_trained = False
    # The commit on the Hub that the model was loaded from; the repository's name is `name_or_path`.
    loaded_commit: str | None = None

    # Building, saving, loading

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedConfig | nn.Module,
        *,
        route_names: Sequence[str] | None = None,
        ticket_task: str | None = None,
        tickets: str | os.PathLike | None = None,
        pretrained: bool | None = None,
        seed: int | None = None,
        norm_statistics: str = "per_route",
        private_parameters: Sequence[str] = (),
        prune_include: Sequence[str] = (),
        prune_exclude: Sequence[str] | None = None,
        **backbone_kwargs: Any,
    ) -> RTLModel:
        """
        A routed model over `backbone`, whose masks keep everything; or one with `tickets` that were made from it.

        Args:
            backbone: a timm name, a repo id, a folder, a configuration or a model; see `build_backbone.py`.
            route_names (`Sequence[str]`): one distinct name per route. With `tickets`, the names of those to load, by
                default all.
            ticket_task (`str`): `"membership"` or `"labels"`, see [`RTLConfig`]. With `membership` the backbone gets
                one logit. With `tickets` it is theirs.
            tickets (`str`, *optional*): a folder that `save_tickets` wrote, or a repository on the Hub. What the masks
                cover and which statistics are kept is then as in the model that the tickets come from.
            pretrained (`bool`, *optional*): whether to load weights; by default only for repo ids and folders.
            seed (`int`, *optional*): seed of newly initialised weights.
            norm_statistics (`str`, *optional*, defaults to `"per_route"`): or `"shared"`.
            private_parameters (`Sequence[str]`, *optional*): `fnmatch` patterns of parameters of which every route has
                its own copy, such as `"*.bias"`; see [`RTLConfig`].
            prune_include (`Sequence[str]`, *optional*): `fnmatch` patterns of weights to add to the default choice.
            prune_exclude (`Sequence[str]`, *optional*): patterns of weights to leave out. Defaults to the backbone's
                own `rtl_prune_exclude`, if it has one.
            **backbone_kwargs: to the backbone, such as `num_labels=3` or `in_chans=1`.

        Raises:
            ValueError: arguments that contradict each other, a pattern that matches nothing, or `tickets` that were
                made from another backbone, also from another revision of its weights.
        """
        if tickets is not None:
            return cls._from_tickets(
                backbone, tickets, route_names, pretrained=pretrained, seed=seed, **backbone_kwargs
            )
        if route_names is None or ticket_task is None:
            raise ValueError(
                "`route_names` and `ticket_task` are needed, as in `from_backbone(…, route_names=['day', 'night'], "
                "ticket_task='labels')`; or `tickets`, which say both."
            )
        route_names = check_route_names(route_names if isinstance(route_names, str) else list(route_names))
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
            prune_exclude = getattr(getattr(model, "timm_model", model), "rtl_prune_exclude", ())
        prunable = select_prunable(model, include=prune_include, exclude=prune_exclude)
        if built:
            check_buildable(model, cls.backbone_class)
        warn_of_low_coverage(model, prunable, exclude=prune_exclude)
        warn_of_changed_weights(model, prunable)
        config = RTLConfig(
            backbone_config=model.config,
            route_names=route_names,
            ticket_task=ticket_task,
            norm_statistics=norm_statistics,
            private_parameters=private_parameters,
            prunable=prunable,
            prune_include=list(prune_include),
            prune_exclude=list(prune_exclude),
            dtype=model.dtype,
        )
        return cls(config, backbone=model)

    @classmethod
    def _from_tickets(
        cls, backbone: Any, tickets: str | os.PathLike, routes: Sequence[str] | None, **options: Any
    ) -> RTLModel:
        index = read_index(Path(tickets).as_posix())
        if not isinstance(backbone, PreTrainedModel):
            if index["ticket_task"] == "membership":
                options.update(num_labels=1, problem_type="multi_label_classification")
            backbone = build_backbone(backbone, cls.backbone_class, **options)
        covered = {name for name, _ in index["weights"]}
        known = [name for name, _ in select_prunable(backbone)]
        # A model has a route at any time, one of membership two.
        placeholders = ["(no route)", "(no other route)"][: 1 + (index["ticket_task"] == "membership")]
        model = cls.from_backbone(
            backbone,
            route_names=placeholders,
            ticket_task=index["ticket_task"],
            norm_statistics=index["norm_statistics"],
            prune_include=[name for name, _ in backbone.named_parameters() if name in covered - set(known)],
            prune_exclude=[name for name in known if name not in covered],
        )
        model.load_tickets(tickets, routes)
        for placeholder in placeholders:
            model.drop_route(placeholder)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any):
        """
        As `PreTrainedModel.from_pretrained`, for a folder or a repo id, but stricter: missing masks are an error. The
        directory of a finished run stands for the model in its `final/`.

        Raises:
            ValueError: the checkpoint lacks a tensor, its masks are incomplete, damaged or of another model, it was
                saved as another class, or `quantization_config` is given.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "`quantization_config` is not for a routed model, whose masks cannot cover quantised weights. Load it "
                "without, extract a ticket, `model.extract_ticket(route).save_pretrained(folder)`, and load that: "
                "`AutoModel….from_pretrained(folder, quantization_config=…)`."
            )
        pretrained_model_name_or_path = model_folder(pretrained_model_name_or_path)
        if cls is RTLModel:
            saved_class = _saved_class(pretrained_model_name_or_path, kwargs)
            if saved_class is not RTLModel:
                return saved_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        # Tensors of other sizes are reported below, by name.
        kwargs.update(ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"a file of weights of {str(pretrained_model_name_or_path)!r} is cut short or damaged: {error}."
            ) from error
        except (AttributeError, KeyError, RecursionError, TypeError, JSONDecodeError, UnicodeDecodeError):
            check_index(pretrained_model_name_or_path, kwargs)  # transformers reads it unchecked
            raise
        refuse_offloaded_buffers(model.mask_bank.buffers())
        check_loaded(model, pretrained_model_name_or_path, info)
        model.private_parameters.freeze(model.backbone)  # loading makes new parameters
        align(model)
        model.masker.locate()  # loading ties weights
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As `PreTrainedModel`'s, also for compact checkpoints; records where on the Hub the weights are from."""
        config, name = model.config, str(load_config.pretrained_model_name_or_path)
        check_class(model, name)
        check_sizes(model, checkpoint_files or (), name)
        if config.compact is not None:
            tensors = {key: tensor for file in checkpoint_files for key, tensor in load_file(file).items()}
            keys = [f"backbone.{weight}" for weight in model.mask_bank.weight_names]
            keys = [model.all_tied_weights_keys.get(key, key) for key in keys]
            shapes = [rows.shape for rows in model.private_parameters.rows]
            try:
                state_dict = expand_state(tensors, config.compact, keys, model.mask_bank, shapes)
            except ValueError as error:
                raise ValueError(f"the checkpoint {name!r} is damaged: {error}") from error
            config.compact = None
        commit = extract_commit_hash(str(checkpoint_files[0]), None) if checkpoint_files else None
        if commit is not None and not Path(name).is_dir():
            model.loaded_commit = commit
            if config.base is not None:
                # A copy that was pushed elsewhere keeps the base that its configuration names.
                config.base = {"repo": name, "revision": commit, **config.base}
        return RoutedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        compact: bool = False,
        push_to_hub: bool = False,
        processing_class: Any = None,
        with_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As `PreTrainedModel.save_pretrained`: weights, masks and statistics in one safetensors checkpoint.

        Files are written beside the folder and then moved into it one by one, each whole, `config.json` last.

        Args:
            compact (`bool`, *optional*, defaults to `False`): leave out the weights that no ticket keeps, and zeros
                that a refit left for removed units, and code the masks. After loading, all tickets and their union
                are the same to the bit. The weights that were left out are zero, so the dense network and θ0 are lost.
            processing_class (*optional*): image processor, feature extractor or tokenizer to save with the model, so
                that a pipeline finds it. timm's cannot be saved: an equivalent one of transformers replaces it.
            with_code (`bool`, *optional*, defaults to `False`): add the code of the model, so that it can be loaded
                without this package, by the Auto classes of transformers with `trust_remote_code=True`. For backbones
                of other packages than timm and transformers, the code is left out with a warning.

        Raises:
            TypeError, ValueError: the model or `processing_class` cannot be saved.
        """
        self.check_savable()
        processing_class = savable_processor(processing_class)
        warn_of_unfitting_processor(processing_class, self.backbone, self.backbone_class)
        self.config.mask_fingerprint = self.mask_bank.fingerprint()
        self.config.base = base_fingerprint(self)
        of_push = inspect.signature(self.push_to_hub).parameters
        hub_arguments = {name: value for name, value in kwargs.items() if name in of_push}
        for name in hub_arguments.keys() - {"max_shard_size"}:
            del kwargs[name]
        # In the original format a later `load_state_dict`, as `Trainer` does on resume, would miss renamed tensors.
        kwargs.setdefault("save_original_format", False)
        target = Path(save_directory)
        with written_whole(target, last="config.json", stale="model*.safetensors*") as staging:
            if compact:
                private = self.private_parameters.rows
                state, codings = compact_state(self.state_dict(), self.masker.weights, self.mask_bank, private)
                kwargs["state_dict"], self.config.compact = state, codings
            try:
                super().save_pretrained(str(staging), **kwargs)
            finally:
                self.config.compact = None
            if processing_class is not None:
                processing_class.save_pretrained(str(staging))
            if with_code:
                save_code(self, staging)
        if push_to_hub:
            hub_arguments.update(compact=compact, processing_class=processing_class, with_code=with_code)
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
        compact: bool = False,
        processing_class: Any = None,
        with_code: bool = False,
    ) -> CommitInfo:
        """
        As `PreTrainedModel.push_to_hub`, in one commit, which also removes the weights of an earlier push. The model
        card keeps what was written by hand into the existing one.

        Args:
            compact (`bool`, *optional*), processing_class (*optional*), with_code (`bool`, *optional*): see
                `save_pretrained`.
            parent_commit (`str`, *optional*): hash of the commit that the branch must still be at; by default the
                current one. So the second of two pushes at the same time is refused, and nothing is lost.

        Raises:
            TypeError, ValueError: see `save_pretrained`.
            HfHubHTTPError, RuntimeError: the Hub refuses the push or an upload. No branch has changed then.
        """
        self.check_savable()
        processing_class = savable_processor(processing_class)

        def write(folder: Path, repo_id: str, head: str | None) -> None:
            self.save_pretrained(
                folder,
                max_shard_size=max_shard_size,
                compact=compact,
                processing_class=processing_class,
                with_code=with_code,
            )
            write_model_card(self, folder, repo_id=repo_id, revision=head, tags=tags, token=token)

        repo_id, commit = push(
            write,
            repo_id,
            outdated=MODEL_FILES,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
        )
        self.config.base = {"repo": repo_id, "revision": commit.oid, **(self.config.base or {})}
        return commit

    # Tickets without their model

    def save_tickets(
        self,
        save_directory: str | os.PathLike,
        routes: Sequence[int | str] | None = None,
        *,
        base_routes: Sequence[int | str] | None = None,
    ) -> dict[str, Any]:
        """
        Writes tickets without their model, for other copies of it: masks, rows of statistics, thresholds, and weights
        that the base lacks. A ticket takes about a bit per prunable weight, or per unit where whole neurons or
        channels are removed; see `ticket_files.py`.

        Args:
            save_directory (`str`): a folder; tickets of an earlier save in it are replaced. If it has the `README.md`
                of a push of tickets, the generated part of this card is updated.
            routes (`Sequence[int | str]`, *optional*): whose tickets; by default all.
            base_routes (`Sequence[int | str]`, *optional*): the routes that the other copies have. The weights in
                their union are not written. By default all routes except those that were added to this model.

        Returns:
            The index that was written; see `ticket_files.read_index`.

        Raises:
            TypeError: `routes` or `base_routes` is a single route.
            ValueError: an unknown or repeated route, or a `README.md` that cannot be read. Nothing is written then.
        """
        self.check_savable()
        chosen = range(self.num_routes) if routes is None else self._route_indices("routes", routes)
        if base_routes is None:
            base_routes = [name for name in self.route_names if name not in self.config.added_routes]
        known = self._route_indices("base_routes", base_routes)
        return save_tickets(self, Path(save_directory), chosen, base_routes=known)

    def load_tickets(
        self,
        name_or_path: str | os.PathLike,
        routes: Sequence[str] | None = None,
        *,
        rename: Mapping[str, str] | Literal["auto"] | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> list[str]:
        """
        Adds tickets that were made from the same base as this model. The model may be a compact copy or one in a
        smaller type, and may have gained other tickets.

        Statistics of the union of all tickets, route -1, do not change.

        Args:
            name_or_path (`str`): a folder that `save_tickets` wrote, or a repository on the Hub.
            routes (`Sequence[str]`, *optional*): names of the tickets to add; by default all. Only their files are
                downloaded.
            rename (`Mapping[str, str]` or `"auto"`, *optional*): new names for tickets whose names are taken;
                `"auto"` adds `-2` and so on.
            revision, token, cache_dir, local_files_only: see `from_pretrained`.

        Returns:
            Names of the routes that were added, the last ones of the model.

        Raises:
            ValueError: no ticket files, or damaged ones; a newer version; another base (the message names the tensors
                that differ); an unknown or a taken name; or other values for weights that other tickets keep. The
                model has not changed then.
        """
        self._refuse_change("load_tickets()")
        refuse_offloaded(self, "load_tickets()")
        hub_arguments = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return load_tickets(self, Path(name_or_path).as_posix(), routes, rename=rename, **hub_arguments)

    def push_tickets_to_hub(
        self,
        repo_id: str,
        routes: Sequence[int | str] | None = None,
        *,
        base_routes: Sequence[int | str] | None = None,
        commit_message: str = "Upload tickets",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> CommitInfo:
        """
        Pushes what `save_tickets` writes, and a card, in one commit, which also removes ticket files of an earlier
        push. The card keeps what was written by hand into the existing one. The card of a model does not change.

        For arguments and errors see `save_tickets` and `push_to_hub`.
        """
        self.check_savable()

        def write(folder: Path, repo_id: str, head: str | None) -> None:
            index = self.save_tickets(folder, routes, base_routes=base_routes)
            write_tickets_page(folder, index, read_card(repo_id, head, token=token), repo_id=repo_id)

        return push(
            write,
            repo_id,
            outdated=TICKET_FILES,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit,
            commit_message=commit_message,
        )[1]

    def _route_indices(self, argument: str, routes: Sequence[int | str]) -> list[int]:
        if isinstance(routes, (str, int)):
            raise TypeError(f"`{argument}` must be a list of routes, got {routes!r}; for one write [{routes!r}].")
        indices = [self.mask_bank.route_index(route) for route in routes]
        if len(set(indices)) < len(indices):
            raise ValueError(f"`{argument}` = {list(routes)} names a route twice.")
        return indices

    @torch.no_grad()
    def extract_ticket(
        self,
        route: int | str,
        *,
        small: bool = False,
        refit: Any = None,
        prune_structure: bool = False,
        example_inputs: Mapping[str, Tensor] | None = None,
    ) -> PreTrainedModel:
        """
        A new plain backbone holding the masked weights, the private parameters and the statistics of `route`; its
        outputs are bit-equal.

        It shares nothing with this model, and the library's own Auto class loads it; for `membership` its only label
        is the route's name. A ticket of a backbone of this package, such as `ghostnet_rtl`, is a plain timm model too,
        but timm knows its architecture only after `import hf_rtl`.

        Args:
            route (`int` or `str`): index or name of a route; -1 for the union of all tickets.
            small (`bool`, *optional*, defaults to `False`): also remove the units that the ticket does not use, such
                as whole neurons; see `small_ticket.remove_units`. Outputs are then equal to rounding. Where a
                configuration can say the smaller shapes, that of the ticket does; else it cannot be saved.
            refit (*optional*): samples of the route, as a map-style data set of what the backbone takes or as batches
                that can be read several times. On these the weights that read units are solved anew, so that they give
                what the network gives without masks; see [`refit`].
            prune_structure (`bool`, *optional*, defaults to `False`): also remove the channels that never matter,
                where that is exact: see `standalone.remove_dead_channels`. Outputs are then equal to rounding, not to
                the bit (1e-6 relative in float32). If any channel is removed, shapes no longer follow the
                configuration, and `save_pretrained` and `push_to_hub` of the ticket raise a `ValueError`: use
                `torch.export` or ONNX.
            example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, with which the graph of the
                network is followed. By default images of the configured size, or the backbone's `dummy_inputs`.

        Raises:
            ValueError: an unknown route, `example_inputs` are needed, or the code of the backbone needs the sizes
                that it has.
        """
        self._refuse_in_context("extract_ticket()")
        refuse_offloaded(self, "extract_ticket()")
        index = self.route_index(route)
        ticket = extract_ticket(self, index, prune_structure=prune_structure, example_inputs=example_inputs)
        if refit is not None:
            dense = extract_ticket(self, index, masked=False)
            refit_ticket(ticket, dense, refit, self.unit_layers(example_inputs))
        return remove_units(ticket, example_inputs, layers=self.unit_layers(example_inputs)) if small else ticket

    def make_small_ticket(self, index: int) -> PreTrainedModel:
        return remove_units(extract_ticket(self, index), layers=self.unit_layers())

    def unit_layers(self, example_inputs: Mapping[str, Tensor] | None = None) -> list[UnitLayer]:
        """The layers of units of the backbone, found once; see [`find_units`]."""
        if self._unit_layers is None:
            self._unit_layers = find_units(self.backbone, example_inputs)
        return self._unit_layers

    # What is here

    def prunable_report(self) -> str:
        """
        A table of the weights that the masks cover, and how many parameters they do not. Where layers standardise
        their weights, a line says what share of those is zero in the masks, and what share where the layers compute.
        """
        table = coverage_table(self.backbone, self.mask_bank.weight_names)
        return table + changed_weights_report(self.backbone, self.mask_bank)

    def footprint(self) -> dict[str, int]:
        """Bytes of this model in its smallest lossless form, and of one pruned model per route; see `footprint.py`."""
        return footprint(self)

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
            "active_route": self.active.route,
            "norm_statistics": self.config.norm_statistics,
            "private_parameters": list(self.private_parameters.names),
            "mask_cache": {"bytes": self.masker.cached_bytes(), "limit": self.masker.cache_bytes},
            "ticket_cache": {"bytes": self.tickets.num_bytes(), "limit": self.config.mask_cache_bytes},
            "router": self.config.router,
            "calibrated": self.config.thresholds is not None,
        }


class _RTLImageModel(RTLModel):
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, route_ids: Any = None, **kwargs: Any
    ):
        """
        Args:
            pixel_values (`Tensor`): `float [batch, channels, height, width]`.
            labels (`Tensor`, *optional*): `int64 [batch]`, of the task, for pixels `[batch, height, width]`; for
                `membership` 0 or 1, whether the sample is of the route, and without `route_ids` its home route.
            route_ids (*optional*): whose ticket answers; see [`RTLModel`].
            **kwargs: to the backbone, and `return_dict`.

        Returns:
            The backbone's output: `logits` `[batch, num_labels]` (`membership`: `[batch, 1]`, without `route_ids`
            `[batch, num_routes]`), for pixels `[batch, num_labels, height, width]` at the backbone's own resolution;
            with `labels` also `loss`. Where a router decides, `route_ids` `int64 [batch]` and `route_scores`
            `float32 [batch, num_routes]`, log probabilities.

        Raises:
            TypeError, ValueError: unknown or missing `route_ids`, or `labels` of another kind.
        """
        return self._forward_routed(labels, route_ids, pixel_values=pixel_values, **kwargs)


class RTLModelForImageClassification(_RTLImageModel):
    """
    A ticket per route in a backbone that classifies images, from timm or transformers.

    Example:
        >>> model = RTLModelForImageClassification.from_backbone(
        ...     "test_resnet", route_names=["day", "night"], ticket_task="labels", num_labels=3
        ... ).eval()
        >>> model(pixel_values=torch.zeros(2, 3, 32, 32), route_ids=["night", "day"]).logits.shape
        torch.Size([2, 3])
    """

    backbone_class = transformers.AutoModelForImageClassification
    supports_membership = True


class RTLModelForSemanticSegmentation(_RTLImageModel):
    """
    A ticket per route in a backbone that gives every pixel a label.

    Example:
        >>> from transformers import SegformerConfig
        >>> config = SegformerConfig(hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
        >>> model = RTLModelForSemanticSegmentation.from_backbone(
        ...     config, route_names=["city", "country"], ticket_task="labels", num_labels=5
        ... ).eval()
        >>> model(pixel_values=torch.zeros(2, 3, 64, 64), route_ids=["city", "country"]).logits.shape
        torch.Size([2, 5, 16, 16])
    """

    backbone_class = transformers.AutoModelForSemanticSegmentation


class RTLModelForAudioClassification(RTLModel):
    """
    A ticket per route in a backbone that classifies sounds.

    Example:
        >>> from transformers import Wav2Vec2Config
        >>> config = Wav2Vec2Config(
        ...     hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
        ...     conv_kernel=(10,), conv_stride=(5,), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2
        ... )
        >>> model = RTLModelForAudioClassification.from_backbone(
        ...     config, route_names=["street", "room"], ticket_task="labels", num_labels=3
        ... ).eval()
        >>> model(input_values=torch.zeros(2, 400), route_ids=["room", "street"]).logits.shape
        torch.Size([2, 3])
    """

    backbone_class = transformers.AutoModelForAudioClassification
    supports_membership = True

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        route_ids: Any = None,
        **kwargs: Any,
    ):
        """
        As [`RTLModelForImageClassification.forward`], for sounds: `input_values` are `float [batch, num_samples]`, or
        features from the backbone's feature extractor; `attention_mask` is `int64 [batch, num_samples]`.
        """
        return self._forward_routed(
            labels, route_ids, input_values=input_values, attention_mask=attention_mask, **kwargs
        )


class _RTLTextModel(RTLModel):
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        route_ids: Any = None,
        **kwargs: Any,
    ):
        """
        Args:
            input_ids (`Tensor`), attention_mask (`Tensor`, *optional*), token_type_ids (`Tensor`, *optional*):
                `int64 [batch, length]`.
            labels (`Tensor`, *optional*): `int64 [batch]` for sequences, else `[batch, length]` with -100 where there
                is none; for `membership` see [`RTLModelForImageClassification.forward`].
            route_ids (*optional*): whose ticket answers; see [`RTLModel`].
            **kwargs: to the backbone, such as `decoder_input_ids`, and `return_dict`.

        Returns:
            The backbone's output: `logits` `[batch, num_labels]` for sequences (`membership`: `[batch, 1]`, without
            `route_ids` `[batch, num_routes]`), `[batch, length, num_labels]` for tokens, `[batch, length,
            vocabulary]` for language models; with `labels` also `loss`. Where a router decides, `route_ids`
            `int64 [batch]` and `route_scores` `float32 [batch, num_routes]`, log probabilities.

        Raises:
            TypeError, ValueError: unknown or missing `route_ids`, or `labels` of another kind.
        """
        return self._forward_routed(
            labels,
            route_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            **kwargs,
        )


class RTLModelForSequenceClassification(_RTLTextModel):
    """
    A ticket per route in a backbone that classifies texts.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
        >>> model = RTLModelForSequenceClassification.from_backbone(
        ...     config, route_names=["books", "films"], ticket_task="labels", num_labels=3
        ... )
        >>> model(input_ids=torch.ones(2, 5, dtype=torch.long), route_ids="books").logits.shape
        torch.Size([2, 3])
    """

    backbone_class = transformers.AutoModelForSequenceClassification
    supports_membership = True


class RTLModelForTokenClassification(_RTLTextModel):
    """A ticket per route in a backbone that gives every token a label: `logits` `[batch, length, num_labels]`."""

    backbone_class = transformers.AutoModelForTokenClassification


class RTLModelForMaskedLM(_RTLTextModel):
    """A ticket per route in a backbone that fills in masked tokens: `logits` `[batch, length, vocabulary]`."""

    backbone_class = transformers.AutoModelForMaskedLM


class RTLModelForCausalLM(RoutedGenerationMixin, _RTLTextModel):
    """
    A ticket per route in a backbone that continues texts: `logits` `[batch, length, vocabulary]`, and `generate`.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
        >>> model = RTLModelForCausalLM.from_backbone(config, route_names=["en", "fr"], ticket_task="labels").eval()
        >>> prompts = torch.full((2, 3), 7)
        >>> model.generate(prompts, route_ids=["fr", "en"], min_new_tokens=4, max_new_tokens=4).shape
        torch.Size([2, 7])
    """

    backbone_class = transformers.AutoModelForCausalLM
    _shifts_labels = True


class RTLModelForSeq2SeqLM(RoutedGenerationMixin, _RTLTextModel):
    """
    A ticket per route in a backbone that turns texts into others: `logits` `[batch, target length, vocabulary]`, and
    `generate`. Its forward also takes `decoder_input_ids` or `labels`, `int64 [batch, target length]`.
    """

    backbone_class = transformers.AutoModelForSeq2SeqLM

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """As the backbone's: the labels moved by one position, for `DataCollatorForSeq2Seq(model=…)`."""
        return self.backbone.prepare_decoder_input_ids_from_labels(labels)


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
    """Lets `AutoConfig` and the Auto class of each task build the classes of this file for `model_type="rtl"`."""
    AutoConfig.register(RTLConfig.model_type, RTLConfig, exist_ok=True)
    for task_class in TASK_CLASSES:
        task_class.backbone_class.register(RTLConfig, task_class, exist_ok=True)


def model_folder(name_or_path: str | os.PathLike) -> str | os.PathLike:
    """
    The folder of the model that a name stands for: the `final/` of a directory of a run, else the name as it is.

    Raises:
        ValueError: the directory of a run that is not finished.
    """
    folder = Path(name_or_path)
    if not (folder / "run.json").exists() or (folder / "config.json").exists():
        return name_or_path
    if not (folder / "final").exists():
        rounds = ", ".join(repr(str(path.parent)) for path in sorted(folder.glob("round-*/config.json")))
        raise ValueError(
            f"{str(folder)!r} holds a run that is not finished; its models are {rounds or 'not yet made'}."
        )
    return folder / "final"


def _saved_class(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> type[RTLModel]:
    """The task class named by a saved configuration; only `TASK_CLASSES` are looked up."""
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
