"""Which weights of a backbone are prunable."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .experts import find_routers, is_stack


logger = logging.getLogger(__name__)

_LAYERS = (nn.Linear, _ConvNd, Conv1D)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def parameter_aliases(backbone: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """
    First name of every parameter of the backbone -> all (module, attribute) that hold it, tied places included.

    A module that is registered twice appears once.
    """
    names: dict[int, str] = {}
    aliases: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in backbone.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = names.setdefault(id(parameter), f"{prefix}.{attribute}".lstrip("."))
                aliases.setdefault(name, []).append((module, attribute))
    return aliases


def parameter_at(place: tuple[nn.Module, str]) -> nn.Parameter:
    """The parameter registered at (module, attribute), even while another tensor hides it."""
    module, attribute = place
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def select_prunable(
    backbone: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[tuple[str, tuple[int, ...]]]:
    """
    Names and shapes of the prunable weights of `backbone`, in the order of its modules.

    By default: the `weight` (never the bias) of convolutions, linear layers and their relatives (`Conv1D`, the input
    projections of `nn.MultiheadAttention`), and fused experts (see `experts.is_stack`), outside embeddings, norms,
    routers of experts and the head. The head is what lies outside
    `base_model`, the output embeddings, and a timm model's classifier. A tied tensor counts once, and is left out if
    any of its places is.

    Args:
        backbone (`nn.Module`): a transformers model, timm models wrapped as `TimmWrapper…`.
        include (`Sequence[str]`): `fnmatch` patterns of parameter names (any name of a tied tensor). Matches of two
            dimensions or more are added.
        exclude (`Sequence[str]`): patterns of the same kind. Matches are left out, also those of `include`.

    Raises:
        ValueError: a pattern that matches no weight, nothing left to prune, or weights that masks cannot cover: of a
            quantised model, or recomputed from other tensors.
    """
    _refuse_quantised(backbone)
    kept_dense = _kept_dense(backbone)
    used: set[str] = set()
    chosen: list[tuple[str, tuple[int, ...]]] = []
    module_names = {id(module): name for name, module in backbone.named_modules()}
    for name, places in parameter_aliases(backbone).items():
        parameter = parameter_at(places[0])
        if parameter.ndim < 2 or any(attribute.endswith("bias") for _, attribute in places):
            continue
        names = alias_names(places, module_names)
        included, excluded = matching_patterns(names, include), matching_patterns(names, exclude)
        used |= included | excluded
        default = all(
            id(module) not in kept_dense and _is_prunable(module_names[id(module)], module, attribute)
            for module, attribute in places
        )
        if (default or included) and not excluded:
            chosen.append((name, tuple(parameter.shape)))
    some = ", ".join(repr(name) for name, _ in chosen[:3]) or "nothing here"
    for argument, patterns in (("prune_include", include), ("prune_exclude", exclude)):
        refuse_unmatched(argument, patterns, used, f"weight of {type(backbone).__name__}; names look like {some}")
    for name, _ in chosen:
        refuse_unmaskable(name, backbone.get_parameter(name))
    if not chosen:
        raise ValueError(f"{type(backbone).__name__} has no prunable weight; name some with `prune_include`.")
    return chosen


def refuse_unmatched(argument: str, patterns: Sequence[str], used: Set[str], what: str) -> None:
    """Raises `ValueError` for a pattern of `argument` that is not in `used`. `what`: what it could have matched."""
    for pattern in patterns:
        if pattern not in used:
            raise ValueError(
                f"`{argument}` has the pattern {pattern!r}, which matches no {what}. Patterns are those of fnmatch "
                f"and cover the whole name, as in '*{pattern.strip('*')}*'."
            )


def refuse_unmaskable(name: str, weight: Tensor) -> None:
    """Raises `ValueError` if masks cannot cover the parameter called `name`: a float whose bits are 0 must be zero."""
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"{name} cannot be masked: it is a {type(weight).__name__} of {weight.dtype}, and masks cover ordinary "
            "tensors of floats, neither quantised nor sharded nor traced. Do that to a ticket instead, "
            "a plain model that `model.extract_ticket(route)` makes before."
        )


def _refuse_quantised(backbone: nn.Module) -> None:
    """Raises `ValueError` for layers that compute with another tensor than the parameter that masks would cover."""
    way_out = "Wrap the model without that, and do it to an extracted ticket, which is a plain model."
    if getattr(backbone, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(backbone).__name__} is quantised (`quantization_config`), and masks cannot cover that. {way_out}"
        )
    for name, module in backbone.named_modules():
        kind = f"{name or 'the backbone'} ({type(module).__module__}.{type(module).__name__})"
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(f"{kind} is quantised, and masks cannot cover that. {way_out}")
        computed = [attribute for attribute, value in vars(module).items() if isinstance(value, Tensor)]
        if any(name.startswith(f"{attribute}_") for attribute in computed for name in module._parameters):
            raise ValueError(
                f"{kind} computes its weight by a hook before each forward, as those of torch.nn.utils.prune, "
                f"weight_norm and spectral_norm, and such a layer can neither be masked nor copied. {way_out} "
                "`torch.nn.utils.prune.remove(layer, 'weight')` makes it permanent; torch.nn.utils.parametrizations "
                "has norms without hooks."
            )
        copies = [
            buffer
            for buffer, values in module.named_buffers(recurse=False)
            for name, own in module.named_parameters(recurse=False)
            if buffer.startswith(f"{name}_") and own.ndim > 1 and own.shape == values.shape
        ]
        if copies:
            raise ValueError(
                f"{kind} is quantised: beside its weight it has another of the same shape, `{copies[0]}`, and masks "
                f"cannot cover both. {way_out}"
            )


def uncovered_matrices(backbone: nn.Module, covered: Sequence[str]) -> dict[str, int]:
    """
    Names and sizes of the matrices that no mask covers: parameters of two dimensions or more outside embeddings, the
    head and routers of experts, biases and parameters with a dimension of 1 left out.
    """
    kept_dense, known = _kept_dense(backbone), set(covered)
    return {
        name: parameter_at(places[0]).numel()
        for name, places in parameter_aliases(backbone).items()
        if name not in known and all(_is_matrix(*place) and id(place[0]) not in kept_dense for place in places)
    }


def _is_matrix(module: nn.Module, attribute: str) -> bool:
    shape = parameter_at((module, attribute)).shape
    named = "bias" in attribute or "embed" in attribute
    return len(shape) > 1 and 1 not in shape and not named and not isinstance(module, nn.Embedding)


def warn_of_low_coverage(
    backbone: nn.Module, weights: Sequence[tuple[str, Sequence[int]]], *, exclude: Sequence[str]
) -> None:
    """Warns if masks cover less than half of the matrices (see `uncovered_matrices`) that `exclude` does not name."""
    sizes = uncovered_matrices(backbone, [name for name, _ in weights])
    sizes = {name: size for name, size in sizes.items() if not matching_patterns([name], exclude)}
    covered = sum(math.prod(shape) for _, shape in weights)
    total = covered + sum(sizes.values())
    if 2 * covered < total:
        patterns: Counter[str] = Counter()
        for name, size in sizes.items():
            patterns[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] += size
        largest = [pattern for pattern, _ in patterns.most_common()]
        logger.warning(
            f"Masks cover {covered:,} of the {total:,} weights in matrices of {type(backbone).__name__} "
            f"({covered / total:.0%}), embeddings and head left out, and sparsity is counted over these alone. "
            f"`prune_include={largest[:8]}`{' and more' if len(largest) > 8 else ''} covers the rest, if those are "
            "multiplied like weights of layers; `prune_exclude` of the same says that they are meant to stay dense."
        )


def coverage_table(backbone: nn.Module, covered: Sequence[str]) -> str:
    """The parameters named in `covered` with shapes and sizes, their total, and the size of all others."""
    parameters = dict(backbone.named_parameters())
    rows = [(name, str(tuple(parameters[name].shape)), parameters[name].numel()) for name in covered]
    inside, matrices = sum(size for *_, size in rows), sum(uncovered_matrices(backbone, covered).values())
    outside = sum(p.numel() for p in parameters.values()) - inside - matrices
    rows += [("prunable", "", inside), ("dense: matrices that no mask covers", "", matrices)]
    rows.append(("dense: embeddings, norms, biases, head, routers", "", outside))
    return "\n".join(f"{name:60} {shape:>24} {size:>12,}" for name, shape, size in rows)


def _is_prunable(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether a parameter, of the module called `name`, is of a kind that is prunable by default."""
    if isinstance(module, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return (isinstance(module, _LAYERS) and attribute == "weight") or is_stack(name, module, attribute)


def _kept_dense(backbone: nn.Module) -> set[int]:
    """`id` of every module in the head, and in the routers of experts."""
    parts = [*heads(backbone), *find_routers(backbone)]
    return {id(module) for part in parts for module in part.modules()}


def heads(backbone: nn.Module) -> Iterator[nn.Module]:
    """The modules that make up the head; empty for a model without one."""
    timm_model: Any = getattr(backbone, "timm_model", None)
    if timm_model is not None:
        classifier = timm_model.get_classifier()
        yield from classifier if isinstance(classifier, tuple) else (classifier,)
        return
    base: Any = getattr(backbone, "base_model", backbone)
    inside = {id(module) for module in base.modules()}
    yield from (child for child in backbone.children() if id(child) not in inside)
    get_output_embeddings: Any = getattr(backbone, "get_output_embeddings", lambda: None)
    output_embeddings = get_output_embeddings()
    if output_embeddings is not None:
        yield output_embeddings


def alias_names(places: Sequence[tuple[nn.Module, str]], module_names: Mapping[int, str]) -> list[str]:
    """The names of a parameter: several if it is tied. `module_names`: `id` of a module -> its name."""
    return [f"{module_names[id(module)]}.{attribute}".lstrip(".") for module, attribute in places]


def matching_patterns(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The `fnmatch` patterns that match any of the names that a parameter has."""
    return {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
