"""Configuration of a routed model, and checks of what a configuration may name."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import timm
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checks import check_choice, folders_beside
from .configuration_kinds import check_kinds, shortened
from .mask_bank import check_route_names
from .mask_coding import format_version


VERSION = "0.1.0.dev0"
# Newest version of the files of `save_pretrained`. It grows with every change that older versions cannot read. Files
# that these can read have their version, see `mask_coding.format_version`.
FORMAT_VERSION = 2
TICKET_TASKS = ("membership", "labels")
NORM_STATISTICS = ("per_route", "shared")
COMPUTE = ("full", "small")
ROUTERS = ("given", "score", "centroid", "entropy")

# Keys by which a configuration could make its backbone fetch weights or code.
_FORBIDDEN_KEYS = ("auto_map", "backbone", "use_pretrained_backbone", "use_timm_backbone", "quantization_config")
_FORBIDDEN_MODEL_ARGS = ("checkpoint_path", "cache_dir", "scriptable", "exportable")
_MOST_LABELS = 10**6
_OWN_CLASS = re.compile(r"(configuration|modeling)_rtl\.RTL\w+")


class RTLConfig(PreTrainedConfig):
    r"""
    Configuration of an [`RTLModel`].

    It holds the whole configuration of the backbone, so that loading looks up nothing by name. Usually
    `RTLModelFor….from_backbone` makes it.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`): the backbone's configuration, head and labels included.
        route_names (`list[str]`): one distinct name per route; K = `num_routes` is their number.
        ticket_task (`str`): `"membership"`, a ticket answers "is this mine?" with one logit; needs two routes or more.
            `"labels"`, a ticket predicts the task's labels on its own data.
        norm_statistics (`str`, *optional*, defaults to `"per_route"`): which running mean and variance normalisation
            layers use: each ticket's own, or `"shared"` ones (the paper's).
        private_parameters (`list[str]`, *optional*): `fnmatch` patterns of parameters of which every route has its own
            copy, such as norms, biases and head. No mask may cover them, and they may not be tied. Default: none.
        prunable (`list[tuple[str, list[int]]]`): names and shapes of the prunable weights, in the mask bank's order.
        prune_include (`list[str]`, *optional*), prune_exclude (`list[str]`, *optional*): the patterns that led to
            `prunable`, kept for the record.
        router (`str`, *optional*, defaults to `"given"`): what decides an input's route when the caller does not:
            nothing, or a router (`"score"`, `"centroid"`, `"entropy"`, see `routers.py`), which the trainer fits.
        router_features (`int`, *optional*): number of features of a `"centroid"` router.
        router_threshold (`float`, *optional*, defaults to 0): a sample takes `router_fallback` if its likeliest route
            is less probable than this.
        router_fallback (`str`, *optional*): the name of a route; `None` for the union of all tickets.
        thresholds (`list[float]`, *optional*): per route, the logit above which a calibrated membership ticket says
            yes.
        mask_fingerprint (`str`, *optional*): hash of the mask bank, written on save and checked on load.
        base (`dict`, *optional*): identity of the weights, written on save: their `fingerprint` (see `hashing.py`),
            and if they came from the Hub, `repo` and `revision`.
        added_routes (`list[str]`, *optional*): routes whose tickets were added to that base later.
        compact (`dict[str, str]`, *optional*): how the masks of a compact file are coded (see `model_file.py`); `None`
            for other files and in memory.
        mask_cache_bytes (`int`, *optional*, defaults to 268435456): bound on unpacked masks kept in memory for
            training, and on masked weights kept for evaluation without gradients (see `ticket_cache.py`). Those of the
            active route are always kept.
        compute (`str`, *optional*, defaults to `"full"`): what a ticket computes with in evaluation without gradients:
            `"full"`, matrices of the backbone's shapes with zeros in them, as a ticket from `extract_ticket(route)`;
            `"small"`, matrices without the units that the ticket does not use, as one from
            `extract_ticket(route, small=True)`. Outputs of the two are equal to rounding. Training is always full.
        format_version (`int`, *optional*, defaults to 1): of the saved files.

    Every other attribute is the backbone's, to read and to set: `config.pad_token_id` is that of `backbone_config`. So
    a setting has the effect that it has on the plain backbone. For `membership` the labels (`num_labels`, `id2label`,
    `label2id`) are the route names instead.

    Raises:
        ValueError: a field is missing, contradicts another, or names something outside this file: a repo, a path,
            code.
    """

    model_type = "rtl"
    has_no_defaults_at_init = True
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "last_hidden_state",
        "route_ids",
        "route_scores",
    ]

    backbone_config: Any = None
    route_names: list[str] = field(default_factory=list)
    ticket_task: str = ""
    norm_statistics: str = "per_route"
    private_parameters: list[str] = field(default_factory=list)
    prunable: list[tuple[str, list[int]]] = field(default_factory=list)
    prune_include: list[str] = field(default_factory=list)
    prune_exclude: list[str] = field(default_factory=list)
    router: str = "given"
    router_features: int | None = None
    router_threshold: float = 0.0
    router_fallback: str | None = None
    thresholds: list | None = None
    mask_fingerprint: str | None = None
    base: dict | None = None
    added_routes: list[str] = field(default_factory=list)
    compact: dict | None = None
    mask_cache_bytes: int = 2**28
    compute: str = "full"
    hf_rtl_version: str = VERSION
    format_version: int = 1

    def __post_init__(self, **kwargs):
        named_code = kwargs.pop("auto_map", None)
        # The class has it. The base class would set it as an attribute, which would be passed on to the backbone.
        kwargs.pop("model_type", None)
        _refuse_keys(kwargs, "config")
        _check_named_code(named_code)
        # Kept only if this module was itself loaded from a repository; otherwise the installed classes are used.
        if named_code and self._auto_class is not None:
            kwargs["auto_map"] = named_code
        self.backbone_config = _checked_backbone_config(self.backbone_config)
        self.route_names = check_route_names(self.route_names or [])
        check_choice("ticket_task", self.ticket_task, TICKET_TASKS)
        check_choice("norm_statistics", self.norm_statistics, NORM_STATISTICS)
        check_choice("router", self.router, ROUTERS)
        check_choice("compute", self.compute, COMPUTE)
        self.private_parameters = _checked_patterns(self.private_parameters)
        self.prunable = _checked_prunable(self.prunable)
        self.prune_include = list(self.prune_include or [])
        self.prune_exclude = list(self.prune_exclude or [])
        label_names = self._label_names()
        num_labels = kwargs.pop("num_labels", None)
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(self._label_conflict(num_labels, label_names))
        given_labels: dict | None = self.__dict__["id2label"]
        if given_labels is not None:
            given = [name for _, name in sorted(given_labels.items(), key=lambda item: int(item[0]))]
            if given != label_names:
                raise ValueError(self._label_conflict(given, label_names))
        self.id2label = dict(enumerate(label_names))
        self.label2id = {name: index for index, name in self.id2label.items()}
        if self.ticket_task == "membership":
            self._check_membership()
        # Hidden from the base class, which would reset the backbone's attention implementation if none is set here.
        backbone_config, self.backbone_config = self.backbone_config, None
        super().__post_init__(**kwargs)
        self.backbone_config = backbone_config
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name))
        self._pass_on()
        self.check()

    # One configuration: the backbone's attributes are attributes of this one

    def _is_own(self, name: str) -> bool:
        if name.startswith("_") or name in _OWN or not isinstance(self.backbone_config, PreTrainedConfig):
            return True
        return name in _LABELS and self.ticket_task == "membership"

    def _pass_on(self) -> None:
        """Moves what the base class has set here, and is the backbone's, to the backbone. Defaults change nothing."""
        defaults = {field.name: field.default for field in fields(PreTrainedConfig)}
        if self.__dict__.pop("_output_attentions"):
            self.backbone_config.output_attentions = True
        for name in [name for name in self.__dict__ if not self._is_own(name)]:
            value = self.__dict__.pop(name)
            if name not in _LABELS and (name not in defaults or value != defaults[name]):
                setattr(self.backbone_config, name, value)

    def __getattribute__(self, name: str) -> Any:
        if name in _INHERITED and not self._is_own(name):
            return getattr(self.backbone_config, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        # Called for a name that this class lacks. `__dict__` is empty while a copy is made.
        if name.startswith("_") or not isinstance(self.__dict__.get("backbone_config"), PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.backbone_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.backbone_config, name, value)

    def __copy__(self) -> RTLConfig:
        copied = self.draft()
        copied.backbone_config = copy.copy(self.backbone_config)
        return copied

    def draft(self) -> RTLConfig:
        """A copy of the fields of this class. The configuration of the backbone is the same object."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The part of the backbone's configuration that is of text, as transformers asks for it."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    def _get_generation_parameters(self) -> dict[str, Any]:
        # Some backbones declare such parameters, and may have them.
        return self.backbone_config._get_generation_parameters()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any):
        """
        As `PreTrainedConfig.get_config_dict`. Its `OSError` also says what lies beside a folder that is missing.
        Raises `ValueError` if the file holds JSON, but no configuration.
        """
        try:
            found = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            beside = folders_beside(str(pretrained_model_name_or_path))
            if not beside:
                raise
            raise OSError(f"{beside}. As a repo id: {error}") from error
        except Exception as error:  # what came instead decides where it fails
            raise _damaged(f"of {str(pretrained_model_name_or_path)!r} ", error) from error
        if not isinstance(found[0], dict):
            raise _damaged(f"of {str(pretrained_model_name_or_path)!r} ", TypeError(f"it is {type(found[0])}"))
        return found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """
        As `PreTrainedConfig.from_dict`. Raises `ValueError` if the dict is not of this kind of model, or a field has a
        value that it cannot have.
        """
        model_type = config_dict.get("model_type")
        if model_type is None:
            raise ValueError(
                "there is no `config.json` of a model here, or it lacks its `model_type`. Tickets that were saved "
                "without a model are added to a copy of it: `model.load_tickets(…)`."
            )
        if model_type != cls.model_type:
            raise ValueError(
                f"this is the `config.json` of a model of type {model_type!r}, which has no tickets yet; make it the "
                "backbone of a routed model: `RTLModelFor….from_backbone(name, …)`."
            )
        # First, since other fields may have another meaning in a newer format.
        check_format_version(config_dict, FORMAT_VERSION, "the model of this `config.json`")
        try:
            check_kinds(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:  # a value of another type fails wherever it is used first
            raise _damaged("", error) from error

    @property
    def num_routes(self) -> int:
        return len(self.route_names)

    def change_routes(self, route_names: Sequence[str], thresholds: list[float] | None) -> None:
        """Sets other routes and the fields that follow from them. Raises `ValueError` before anything is changed."""
        changed = self.draft()
        changed.route_names, changed.thresholds = check_route_names(route_names), thresholds
        changed.added_routes = [name for name in self.added_routes if name in changed.route_names]
        if changed.ticket_task == "membership":
            changed.id2label = dict(enumerate(changed.route_names))
            changed.label2id = {name: index for index, name in changed.id2label.items()}
            changed._check_membership()
        changed.check()
        self.__dict__.update(changed.__dict__)

    def check(self) -> None:
        """Raises `ValueError` if a field that was changed after construction contradicts the rest."""
        labels = [self.id2label[index] for index in sorted(self.id2label)]
        if labels != self._label_names():
            raise ValueError(self._label_conflict(labels, self._label_names()))
        if self.thresholds is not None and len(self.thresholds) != self.num_routes:
            raise ValueError(
                f"`thresholds` has {len(self.thresholds)} values, expected one per route, {self.num_routes}."
            )
        self._check_router()
        check_choice("compute", self.compute, COMPUTE)
        if not set(self.added_routes) <= set(self.route_names):
            raise ValueError(f"`added_routes` = {self.added_routes} are not all among the routes {self.route_names}.")
        if self.base is not None and not isinstance(self.base.get("fingerprint"), dict):
            raise ValueError(f"`base` must be None or have a dict `fingerprint`, got {self.base}.")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["backbone_config"] = self._backbone_dict()
        output["prunable"] = [[name, list(shape)] for name, shape in self.prunable]
        output["format_version"] = format_version((self.compact or {}).values())
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        output["backbone_config"] = self._backbone_dict()
        return output

    def _backbone_dict(self) -> dict[str, Any]:
        """The whole backbone configuration, without the name it was once loaded from."""
        output = self.backbone_config.to_dict()
        for key in ("_name_or_path", "transformers_version", "auto_map"):
            output.pop(key, None)
        self.dict_dtype_to_str(output)
        return output

    def _check_router(self) -> None:
        if self.router == "entropy" and self.ticket_task == "membership":
            raise ValueError(
                "`router` = 'entropy' compares outputs over several labels, and membership tickets have one; use "
                "'score'."
            )
        if (self.router == "centroid") != (self.router_features is not None):
            raise ValueError(
                f"`router_features` = {self.router_features} with `router` = {self.router!r}: a 'centroid' router has "
                "a number of features, others None."
            )
        if not 0 <= self.router_threshold <= 1:
            raise ValueError(f"`router_threshold` must be a probability in [0, 1], got {self.router_threshold}.")
        if self.router_fallback is not None and self.router_fallback not in self.route_names:
            raise ValueError(
                f"`router_fallback` must be None, for the union of all tickets, or one of "
                f"{', '.join(map(repr, self.route_names))}, got {self.router_fallback!r}."
            )

    def _check_membership(self) -> None:
        if self.num_routes < 2:
            raise ValueError(
                f"`ticket_task='membership'` needs at least two routes, since a ticket tells its own samples from the "
                f"others'; `route_names` has {self.num_routes}. Use `ticket_task='labels'` for a single route."
            )
        if self.backbone_config.num_labels != 1:
            raise ValueError(
                f"`ticket_task='membership'` needs a backbone with one logit, got num_labels="
                f"{self.backbone_config.num_labels}; build it with `num_labels=1, "
                f"problem_type='multi_label_classification'`, as `from_backbone` does."
            )
        if self.backbone_config.problem_type != "multi_label_classification":
            raise ValueError(
                "`ticket_task='membership'` needs a backbone with problem_type='multi_label_classification' (one "
                f"label alone means regression to transformers), got {self.backbone_config.problem_type!r}."
            )

    def _label_names(self) -> list[str]:
        if self.ticket_task == "membership":
            return list(self.route_names)
        id2label = self.backbone_config.id2label or {}
        return [id2label[index] for index in sorted(id2label)]

    def _label_conflict(self, given: list[str] | int, expected: list[str]) -> str:
        owner = "the route names" if self.ticket_task == "membership" else "the backbone's labels"
        return (
            f"`num_labels`/`id2label` of an RTLConfig follow {owner}: expected {len(expected)} ({expected}), got "
            f"{given}. Set them where the backbone is made: `from_backbone(…, num_labels={len(expected)})`."
        )


def _checked_patterns(patterns: Any) -> list[str]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise ValueError(f"`private_parameters` must be a list of patterns, such as ['*.bias'], got {patterns!r}.")
    return list(patterns or ())


def check_format_version(saved: Mapping[str, Any], known: int, what: str) -> None:
    """Raises `ValueError` if files were written in a newer format than `known`. `what` names them in the message."""
    version = saved.get("format_version", 1)
    if type(version) is not int or version > known:
        raise ValueError(
            f"{what} was saved by hf_rtl {saved.get('hf_rtl_version')} in format {version!r}; this is hf_rtl "
            f"{VERSION}, which reads formats up to {known}. Update hf_rtl: `pip install --upgrade hf_rtl`."
        )


def _checked_backbone_config(config: Any) -> PreTrainedConfig:
    """
    A backbone configuration from a mapping or an instance.

    Nothing is looked up, opened or run: a key that would need this is refused, at any depth.
    """
    content = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    if not isinstance(content, Mapping):
        raise ValueError(
            f"`backbone_config` must be a configuration or a dict with a `model_type`, got {type(config).__name__}; "
            "to start from a model's name use `RTLModelForImageClassification.from_backbone(name, …)`."
        )
    _check_model_type(content.get("model_type"), "backbone_config")
    _refuse_keys(content, "backbone_config")
    if isinstance(config, PreTrainedConfig):
        return config
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # every backbone has its own checks, and fails in its own way without
        raise ValueError(
            f"`backbone_config` is no configuration of a {config['model_type']!r}: {type(error).__name__}: {error}"
        ) from error


def _checked_prunable(prunable: Any) -> list[tuple[str, list[int]]]:
    try:
        checked = [(name, [operator.index(size) for size in shape]) for name, shape in prunable or []]
        whole = all(isinstance(name, str) and all(size >= 0 for size in shape) for name, shape in checked)
        # torch counts elements in 64 bits.
        whole = whole and all(math.prod(max(size, 1) for size in shape) < 2**63 for _, shape in checked)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(
            "`prunable` must be a list of names and shapes, such as [['fc.weight', [10, 512]]], got "
            f"{shortened(prunable)}."
        )
    return checked


def _damaged(whose: str, error: Exception) -> ValueError:
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ValueError(f"`config.json` {whose}cannot be used: {reason}")


def _check_named_code(auto_map: Any) -> None:
    """Raises `ValueError` if an `auto_map` is not what `save_pretrained(…, with_code=True)` writes."""
    own = isinstance(auto_map, Mapping) and all(_OWN_CLASS.fullmatch(str(name)) for name in auto_map.values())
    if auto_map and not own:
        raise ValueError(f"`config.auto_map` = {auto_map!r} is not allowed: it names something outside this file.")


def _refuse_keys(value: Any, path: str) -> None:
    if isinstance(value, PreTrainedConfig):
        value = value.to_dict()
    if isinstance(value, Mapping):
        if value.get("model_type"):
            _check_model_type(value["model_type"], path)
        if value.get("model_type") == "timm_wrapper" or "architecture" in value or "model_args" in value:
            _check_timm(value, path)
        for key, inner in value.items():
            if key in _FORBIDDEN_KEYS and inner:
                raise ValueError(f"`{path}.{key}` = {inner!r} is not allowed: it names something outside this file.")
            if key in ("num_labels", "num_classes") and isinstance(inner, int) and inner > _MOST_LABELS:
                raise ValueError(
                    f"`{path}.{key}` = {inner} is more than {_MOST_LABELS:,} labels, each of which has a name."
                )
            if "_implementation" in str(key) and _names_a_repo(inner):
                raise ValueError(f"`{path}.{key}` = {inner!r} is not allowed: it names code on the Hub.")
            _refuse_keys(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _refuse_keys(inner, f"{path}[{index}]")


def _check_model_type(model_type: Any, path: str) -> None:
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or model_type == RTLConfig.model_type:
        raise ValueError(
            f"`{path}` has model_type={model_type!r}, which the installed transformers does not know as a backbone. "
            "Update transformers, or import the package that registers it."
        )


def _check_timm(config: Mapping[str, Any], path: str) -> None:
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not (architecture.isidentifier() and timm.is_model(architecture)):
        raise ValueError(
            f"`{path}.architecture` = {architecture!r} must be a plain name of the installed timm, as listed by "
            "`timm.list_models()`: no ':' and no '/'."
        )
    model_args = config.get("model_args") or {}
    if not isinstance(model_args, Mapping):
        raise ValueError(f"`{path}.model_args` must be a dict of arguments, got {model_args!r}.")
    for key, value in model_args.items():
        if str(key).startswith("pretrained") or key in _FORBIDDEN_MODEL_ARGS:
            raise ValueError(f"`{path}.model_args.{key}` = {value!r} is not allowed.")
        if not _is_plain(value):
            raise ValueError(f"`{path}.model_args.{key}` must be a plain JSON value, got {value!r}.")


def _names_a_repo(implementation: Any) -> bool:
    if isinstance(implementation, Mapping):
        return any(map(_names_a_repo, implementation.values()))
    return isinstance(implementation, str) and "/" in implementation


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


# What a base class gives to every configuration, and is the backbone's in a routed one.
_LABELS = {"id2label", "label2id", "num_labels"}
_OWN = {*RTLConfig.__annotations__, "architectures", "auto_map", "dtype", "name_or_path", "transformers_version"}
_INHERITED = {
    name
    for name, value in inspect.getmembers(PreTrainedConfig)
    if isinstance(value, property) or name in {field.name for field in fields(PreTrainedConfig)}
    if not name.startswith("_") and name not in _OWN
}
