"""Builds the backbone that `from_backbone` wraps: from a name, a folder, a configuration or a model."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, TimmWrapperConfig

from .checks import folders_beside
from .structure import check_structure


_LABEL_ARGUMENTS = ("num_labels", "id2label", "label2id", "problem_type")


@contextlib.contextmanager
def _without_list_of_classes() -> Iterator[None]:
    """A context in which a configuration of another task is refused without the hundred classes that would do."""
    try:
        yield
    except ValueError as error:
        text, is_listed, _ = str(error).partition("\nModel type should be one of")
        if not is_listed:
            raise
        raise ValueError(f"{text} Use the `RTLModelFor…` class of a task that this backbone has.") from None


@_without_list_of_classes()
def build_backbone(
    source: str | Path | PreTrainedConfig | nn.Module,
    auto_class: Any,
    *,
    pretrained: bool | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    The task model that a routed model wraps.

    Args:
        source: a plain timm name (`"resnet18"`); a repo id (`"timm/resnet18.a1_in1k"`, `"bert-base-uncased"`); a
            folder made by `save_pretrained`; a configuration; a transformers model, which is itself returned; or a
            timm model, whose weights are copied.
        auto_class (`type`): the transformers Auto class of the task.
        pretrained (`bool`, *optional*): whether to load weights. Defaults to `True` for repo ids and folders, and to
            `False` for plain timm names, whose weights timm fetches: of its best tag, or of `"resnet18.a1_in1k"`.
            Without another number of labels they keep their head.
        seed (`int`, *optional*): seed of newly initialised weights; a timm model then has the weights that
            `timm.create_model` gives after `torch.manual_seed(seed)`. The global generator does not change.
        **kwargs: fields of the backbone's configuration. For timm names, all but label arguments go to
            `timm.create_model`, such as `in_chans=1`; `num_classes` is another name of `num_labels`.

    Raises:
        ValueError: an argument that the kind of `source` does not allow, or a model that contradicts the arguments or
            that neither timm nor transformers knows.
        OSError: there is no such repo or folder, or the weights are not in the cache and cannot be fetched.
        TypeError: `source` is none of these.
    """
    num_labels, names = kwargs.get("num_labels"), kwargs.get("id2label")
    if num_labels is not None and names is not None and len(names) != num_labels:
        raise ValueError(f"`num_labels` = {num_labels} contradicts the {len(names)} names of `id2label`; give one.")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds accelerators too
        if isinstance(source, PreTrainedModel):
            _refuse("an already built model", pretrained=pretrained, **kwargs)
            return source
        if isinstance(source, nn.Module):
            _refuse("an already built model", pretrained=pretrained)
            return _wrap_timm_model(source, auto_class, kwargs)
        if isinstance(source, PreTrainedConfig):
            _refuse("a configuration", pretrained=pretrained or None)
            return _from_config(source, auto_class, kwargs)
        if not isinstance(source, (str, Path)):
            raise TypeError(
                "`backbone` must be a timm name, a repo id, a folder, a configuration or a model, got "
                f"{type(source).__name__}."
            )
        name = str(source)
        timm_name = name.removeprefix("timm/")
        of_timm = timm.is_model(timm_name) and (name == timm_name or pretrained is False)
        if of_timm and not Path(name).is_dir():
            if pretrained:
                return _pretrained_timm(timm_name, auto_class, kwargs)
            config = _timm_config(timm_name.split(".")[0], kwargs)
            return _created(config.architecture, config, auto_class, pretrained=False)
        try:
            if pretrained is False:
                return _from_config(AutoConfig.from_pretrained(name), auto_class, kwargs)
            return auto_class.from_pretrained(name, ignore_mismatched_sizes=True, **kwargs)
        except OSError as error:
            if timm.is_model(timm_name) and not Path(name).is_dir():
                raise _not_fetched(name, name, error) from error
            raise OSError(
                f"`backbone` = {folders_beside(name) or _no_timm_name(name)} As a repo id: {error}"
            ) from error


def _no_timm_name(name: str) -> str:
    close = get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"{name!r} is no timm name and no folder{hint}"


def _pretrained_timm(name: str, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The timm model `name` with its weights, also those of its head unless `kwargs` ask for other labels."""
    architecture = name.split(".")[0]
    try:
        weights = timm.get_pretrained_cfg(name)
        has_head = weights.num_classes and not any(kwargs.get(key) for key in ("num_classes", *_LABEL_ARGUMENTS[:3]))
        config = _timm_config(architecture, kwargs, **({"num_labels": weights.num_classes} if has_head else {}))
        return _created(name, config, auto_class, pretrained=True)
    except RuntimeError as error:
        known = ", ".join(map(repr, timm.list_pretrained(f"{architecture}.*"))) or "none, so leave out `pretrained`"
        raise ValueError(f"`backbone` = {name!r} with `pretrained=True`: {error} timm has {known}.") from error
    except OSError as error:
        raise _not_fetched(name, weights.hf_hub_id or weights.url, error) from error


def _not_fetched(name: str, source: str, error: OSError) -> OSError:
    reason = str(error).strip().partition("\n")[0]
    return OSError(
        f"the weights of `backbone` = {name!r} could not be fetched from {source!r}, and are not in the cache: "
        f"{reason} Run this once with a network, or copy the cache (`HF_HOME`) of a machine that has them; "
        "`pretrained=False` makes new weights."
    )


def _refuse(kind: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        names = ", ".join(f"`{name}`" for name in given)
        raise ValueError(f"{names} cannot be set for {kind}: it decides that itself.")


def check_buildable(model: PreTrainedModel, auto_class: Any) -> None:
    """Raises `ValueError` unless loading, which has the configuration alone, would build this model."""
    register = f"register a class of your own, with a configuration of its own, by `{auto_class.__name__}.register`."
    if type(model.config) not in auto_class._model_mapping:
        raise ValueError(
            f"`backbone` is a {type(model).__name__}, and {auto_class.__name__} builds no model from its "
            f"configuration, a {type(model.config).__name__}, so that a saved copy could not be loaded: {register}"
        )
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]  # the class, where a configuration is that of several
    with torch.device("meta"):
        built = auto_class.from_config(copy.deepcopy(model.config))
    if type(built) is not type(model):
        raise ValueError(
            f"`backbone` is a {type(model).__name__}, but its configuration builds a {type(built).__name__}, which a "
            f"saved copy would be loaded as: wrap a {type(built).__name__}, or {register}"
        )
    check_structure(model, built, f"Change the configuration and build the model from it, or {register}")


def build_described(config: PreTrainedConfig, auto_class: Any, num_prunable: int) -> PreTrainedModel:
    """
    The backbone that the configuration of a saved model describes.

    Args:
        num_prunable (`int`): the number of its prunable weights. A backbone that has far more modules than these is
            not the one that was saved, and not built to its end, which might never come.

    Raises:
        ValueError: `config` builds no such backbone.
    """
    try:
        with _few_modules(10_000 + 100 * num_prunable):
            return auto_class.from_config(config, dtype=torch.get_default_dtype())
    except (ImportError, OSError):  # the installation lacks something, not the configuration
        raise
    except Exception as error:  # every backbone has its own checks, and fails in its own way without
        raise ValueError(
            f"`backbone_config`, of a {type(config).model_type!r}, builds no backbone: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """A context in which at most so many modules can be made."""
    numbers = itertools.count(1)

    def count(*_: Any) -> None:
        if next(numbers) > most:
            raise ValueError(f"it has more than {most} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _from_config(config: PreTrainedConfig, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    config, is_timm = copy.deepcopy(config), isinstance(config, TimmWrapperConfig)
    for name, value in kwargs.items():
        if not hasattr(config, name):
            hint = "; give arguments of timm.create_model as its `model_args`" if is_timm else ""
            raise ValueError(f"`{name}` is no field of {type(config).__name__}{hint}.")
        setattr(config, name, value)
    if is_timm:
        return _created(config.architecture, config, auto_class, pretrained=False)
    return auto_class.from_config(config)


def _timm_config(architecture: str, kwargs: dict[str, Any], **defaults: Any) -> TimmWrapperConfig:
    """
    The configuration that `kwargs`, of a configuration or of timm, describe; `defaults` are for fields that they lack.
    """
    if kwargs.get("features_only"):
        raise ValueError(
            "`features_only` = True is not supported: tickets are found for an output, and such a model has none. "
            "Leave it out."
        )
    if kwargs.get("num_classes") is not None:
        num_classes = kwargs.pop("num_classes")
        if kwargs.setdefault("num_labels", num_classes) != num_classes:
            raise ValueError(
                f"`num_classes` = {num_classes} contradicts `num_labels` = {kwargs['num_labels']}; give one."
            )
    fields = {**defaults, **kwargs}
    labels = {key: fields[key] for key in _LABEL_ARGUMENTS if fields.get(key) is not None}
    model_args = {key: value for key, value in kwargs.items() if key not in _LABEL_ARGUMENTS}
    return TimmWrapperConfig(architecture=architecture, model_args=model_args or None, **labels)


def _created(name: str, config: PreTrainedConfig, auto_class: Any, *, pretrained: bool) -> PreTrainedModel:
    num_classes = 0 if auto_class is AutoModel else config.num_labels
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **(config.model_args or {}))
    return _wrapped(model, config, auto_class)


def _wrap_timm_model(model: nn.Module, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None or not timm.is_model(architecture):
        raise ValueError(
            f"`backbone` is a {type(model).__name__}, neither a transformers model nor made by timm.create_model; "
            "register it with timm or transformers to wrap it."
        )
    config = _timm_config(architecture, kwargs, num_labels=model.num_classes)
    if config.num_labels != model.num_classes:
        raise ValueError(f"`backbone` has {model.num_classes} classes, but {config.num_labels} are requested.")
    return _wrapped(model, config, auto_class)


def _wrapped(model: nn.Module, config: PreTrainedConfig, auto_class: Any) -> PreTrainedModel:
    """`model` in a TimmWrapper, which initialises weights anew: those of `model` are loaded into it."""
    wrapper = auto_class.from_config(config)
    own = {name: tensor.shape for name, tensor in wrapper.timm_model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if own != given:
        differing = sorted(set(own.items()) ^ set(given.items()))[:3]
        raise ValueError(
            f"`backbone` is not what timm.create_model({config.architecture!r}, **{config.model_args or {}}) builds "
            f"(see {', '.join(name for name, _ in differing)}); pass the arguments that it was made with, such as "
            "`in_chans=1`."
        )
    wrapper.timm_model.load_state_dict(model.state_dict())
    # This configuration has the size and the normalisation of the images that the weights were trained on.
    wrapper.timm_model.pretrained_cfg = model.pretrained_cfg
    return wrapper
