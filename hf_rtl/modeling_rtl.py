"""Routed models: one backbone, a bank of masks, and a ticket per route."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
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
    TimmWrapperConfig,
)
from transformers.utils.hub import create_and_tag_model_card, extract_commit_hash

from .backbone import build_backbone
from .compact import compact_state, expand_state
from .configuration_rtl import RTLConfig
from .files import move_files
from .footprint import footprint
from .generation import RoutedGenerationMixin
from .hub import MODEL_FILES, branch_head, commit_folder, read_card
from .hub_code import save_code
from .image_processing import savable_processor
from .masking import and_masks
from .norm_statistics import tracked_buffers
from .prunable import coverage_table, parameter_aliases, parameter_at, select_prunable
from .routed_model import RoutedModel
from .structure import refuse_to_save, remove_dead_channels
from .ticket_files import base_of
from .ticket_sharing import TicketSharing


logger = logging.getLogger(__name__)

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


class RTLModel(TicketSharing):
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
          sample (K forwards); else the router decides, in evaluation mode (see `routing.py`); a `ValueError` if it is
          `"given"`.
    """

    # What a model card says of the run that the model comes from (see `training_run.py`), after a training.
    training_run: dict[str, Any] | None = None
    # How data that comes later gets its routes (see `partition.Rule`), likewise.
    partition_rule: Any = None
    # Of the repository on the Hub that the model was loaded from; its name is `name_or_path`.
    loaded_commit: str | None = None

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
        private_parameters: Sequence[str] = (),
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
            private_parameters (`Sequence[str]`, *optional*): `fnmatch` patterns of parameters that every route has for
                itself, as `"*.bias"`; see [`RTLConfig`].
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
            private_parameters=private_parameters,
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
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"a file of weights of {str(pretrained_model_name_or_path)!r} is cut short or damaged: {error}."
            ) from error
        saved_as = (model.config.architectures or [cls.__name__])[0]
        if saved_as not in [known.__name__ for known in cls.__mro__]:
            raise ValueError(
                f"the checkpoint {str(pretrained_model_name_or_path)!r} was saved as {saved_as}, which {cls.__name__} "
                "is not; RTLModel.from_pretrained opens it as what it is."
            )
        # Anywhere in the name: for timm backbones the loader puts a prefix before names that it does not know.
        own = {"mask_bank", "norm_statistics", "private_parameters", "router"}
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
        model.private_parameters.freeze(model.backbone)  # loading makes new parameters
        _align(model)
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As `PreTrainedModel`'s, of compact checkpoints too; notes where on the Hub the weights are from."""
        config, name = model.config, str(load_config.pretrained_model_name_or_path)
        if config.compact is not None:
            tensors = {key: tensor for file in checkpoint_files for key, tensor in load_file(file).items()}
            keys = [f"backbone.{weight}" for weight in model.mask_bank.weight_names]
            keys = [model.all_tied_weights_keys.get(key, key) for key in keys]
            state_dict = expand_state(tensors, config.compact, keys, model.mask_bank)
            config.compact = None
        commit = extract_commit_hash(str(checkpoint_files[0]), None) if checkpoint_files else None
        if commit is not None and not Path(name).is_dir():
            model.loaded_commit = commit
            if config.base is not None:
                # A copy that was pushed elsewhere is still of the base that it says.
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
            compact (`bool`, *optional*, defaults to `False`): leave out the weights that no ticket keeps, and code the
                masks. Loaded again all tickets, and their union, are the same to the bit; the weights that were left
                out are zero, so the dense network and θ0 are lost.
            processing_class (*optional*): image processor, feature extractor or tokenizer to save along, so that a
                pipeline finds it. In place of timm's, which cannot be saved, an ordinary one is.
            with_code (`bool`, *optional*, defaults to `False`): add the code of the model, so that it can be loaded
                without this package, by the Auto classes of transformers with `trust_remote_code=True`. Not for
                backbones of other packages than timm and transformers: a warning says that it was left out.
        """
        self._check_savable()
        if processing_class is not None:
            processing_class = savable_processor(processing_class)
        self.config.mask_fingerprint = self.mask_bank.fingerprint()
        self.config.base = base_of(self)
        hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        # In the original format a later `load_state_dict`, as `Trainer` does on resume, would miss renamed tensors.
        kwargs.setdefault("save_original_format", False)
        target = Path(save_directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-", suffix=".tmp") as staging:
            if compact:
                state, codings = compact_state(self.state_dict(), self.masker.weights, self.mask_bank)
                kwargs["state_dict"], self.config.compact = state, codings
            try:
                super().save_pretrained(staging, **kwargs)
            finally:
                self.config.compact = None
            if processing_class is not None:
                processing_class.save_pretrained(staging)
            if with_code:
                save_code(self, Path(staging))
            move_files(Path(staging), target, last="config.json", stale="model*.safetensors*")
        if push_to_hub:
            if "max_shard_size" in kwargs:
                hub_arguments["max_shard_size"] = kwargs["max_shard_size"]
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
        As `PreTrainedModel.push_to_hub`, in one commit, which also removes the weights of an earlier push. Its model
        card keeps what was written by hand into the one that is there.

        Args:
            compact (`bool`, *optional*), processing_class (*optional*), with_code (`bool`, *optional*): as of
                `save_pretrained`; in the same commit.
            parent_commit (`str`, *optional*): hash of the commit that the branch must still be at. By default the one
                that it is at now, so that of two pushes at the same time the second is refused, and nothing is lost.

        Raises:
            ValueError: the model, or what is to be saved along, cannot be saved as it is.
            HfHubHTTPError, RuntimeError: the Hub refuses the push, or an upload, and no branch has changed then.
        """
        self._check_savable()
        if processing_class is not None:
            processing_class = savable_processor(processing_class)
        repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        head = branch_head(repo_id, None if create_pr else revision, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder,
                max_shard_size=max_shard_size,
                compact=compact,
                processing_class=processing_class,
                with_code=with_code,
            )
            self._write_card(Path(folder), repo_id, head, tags=tags, token=token)
            commit = commit_folder(
                Path(folder),
                repo_id,
                outdated=MODEL_FILES,
                parent_commit=parent_commit or head,
                revision=revision,
                token=token,
                create_pr=create_pr,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
            )
        self.config.base = {"repo": repo_id, "revision": commit.oid, **(self.config.base or {})}
        return commit

    def _write_card(
        self, folder: Path, repo_id: str, revision: str | None, *, tags: list[str] | None, token: bool | str | None
    ) -> None:
        try:
            from hf_rtl.model_card import write_card
            from hf_rtl.training_run import copy_run
        except ImportError as error:
            # Custom code from a Hub repository comes without what writes cards.
            if error.name != "hf_rtl":
                raise
            card = create_and_tag_model_card(repo_id, [*(self.model_tags or []), *(tags or [])], token=token)
            card.save(folder / "README.md")
            return
        copy_run(self, folder, token=token)
        remote = read_card(repo_id, revision, token=token)
        write_card(self, folder, remote=remote, model_id=repo_id, **({"tags": tags} if tags else {}))

    @torch.no_grad()
    def extract_ticket(
        self,
        route: int | str,
        *,
        prune_structure: bool = False,
        example_inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> PreTrainedModel:
        """
        A new plain backbone holding the masked weights, the private parameters and the statistics of `route`; its
        outputs are bit-equal.

        It shares nothing with this model and is what the library's own Auto class loads; for `membership` its only
        label is the route's name. A ticket of a backbone of ours, as `ghostnet_rtl`, is a plain timm model too, but
        loading it needs `import hf_rtl` first, since timm does not know the architecture.

        Args:
            route (`int` or `str`): index or name of a route; -1 for the union of all tickets.
            prune_structure (`bool`, *optional*, defaults to `False`): also remove the channels that never matter,
                where that is exact: see `structure.remove_dead_channels`. Outputs are then equal to rounding, not to
                the bit (1e-6 relative in float32). If any channel is removed, shapes no longer follow the
                configuration, and `save_pretrained` and `push_to_hub` of the ticket raise a `ValueError`: use
                `torch.export` or ONNX.
            example_inputs (`Mapping[str, Tensor]`, *optional*): arguments of a forward, with which `prune_structure`
                follows the channels. By default images of the configured size, or the backbone's `dummy_inputs`.

        Raises:
            ValueError: an unknown route, or `prune_structure` needs `example_inputs`.
        """
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
        private = self.private_parameters
        for own, rows, row in zip(private.own(ticket), private.rows, private.row(index), strict=True):
            own.copy_(row)
            own.requires_grad_(rows.requires_grad)
        if self._is_membership:
            name = self.route_name(index)
            ticket.config.id2label, ticket.config.label2id = {0: name}, {name: 0}
            if isinstance(ticket.config, TimmWrapperConfig):
                # What it saves instead, and has from a file if the model was loaded from one.
                ticket.config.label_names = [name]
        if prune_structure:
            report = remove_dead_channels(ticket, example_inputs)
            logger.info("Channels of the ticket of route %s:\n%s", self.route_name(index), report)
            if report.changed:
                ticket.save_pretrained = ticket.push_to_hub = refuse_to_save
        return ticket

    # What is here

    def prunable_report(self) -> str:
        """A table of the weights that the masks cover, and how many parameters they do not."""
        return coverage_table(self.backbone, self.mask_bank.weight_names)

    def footprint(self) -> dict[str, int]:
        """Bytes of this model in its smallest lossless form, and of one pruned model per route; see `footprint.py`."""
        return footprint(self.backbone, self.mask_bank, self.norm_statistics, self.private_parameters, self.router)

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
            "private_parameters": list(self.private_parameters.names),
            "mask_cache": {"bytes": self.masker.cached_bytes(), "limit": self.masker.cache_bytes},
            "router": self.config.router,
            "calibrated": self.config.thresholds is not None,
        }


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


class RTLModelForCausalLM(RoutedGenerationMixin, _RTLTextModel):
    backbone_class = AutoModelForCausalLM
    _shifts_labels = True


class RTLModelForSeq2SeqLM(RoutedGenerationMixin, _RTLTextModel):
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
