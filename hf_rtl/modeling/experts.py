"""Mixtures of experts: which parameters stack the matrices of several experts, and which layers choose among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import CondConv2d
from torch import nn


def is_stack(name: str, module: nn.Module, attribute: str) -> bool:
    """
    Whether a parameter stacks matrices, as fused experts do: a parameter of three dimensions or more that a model's
    own class holds, not a layer of torch, or any matrix in a part called `experts`. In CondConv, an expert is a row.
    """
    parameter = module._parameters[attribute]
    if parameter is None or attribute.endswith(("bias", "_log")) or "embed" in attribute:
        return False
    if isinstance(module, CondConv2d):
        return attribute == "weight"
    of_torch = type(module).__module__.startswith("torch.")
    fused = parameter.ndim > 2 or (parameter.ndim == 2 and "experts" in name.split("."))
    return fused and not of_torch and 1 not in parameter.shape


def find_routers(backbone: nn.Module) -> Iterator[nn.Module]:
    """
    The layers that choose among experts: those whose output transformers records as `router_logits`, and, in a part
    that holds experts, those with a single matrix that gives a number per expert, or one number.
    """
    names = {id(module): name for name, module in backbone.named_modules()}
    for model in backbone.modules():
        declared = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in declared if isinstance(declared, list | tuple) else [declared]:
            kind: Any = getattr(recorder, "target_class", recorder)
            where: str = getattr(recorder, "layer_name", None) or ""
            recorded = [module for name, module in model.named_modules() if isinstance(module, kind) and where in name]
            # Some record a whole block, with its experts.
            yield from (module for module in recorded if not _stacks(names, module) and not _embeds(module))
    for block in backbone.modules():
        sizes = {_num_experts(names, name, part) for name, part in block.named_children()} - {0}
        if sizes:
            yield from (part for part in block.children() if _gives(part, sizes | {1}) and not _stacks(names, part))


def _stacks(names: dict[int, str], module: nn.Module) -> list[Any]:
    """The stacked parameters in a module."""
    return [
        parameter
        for part in module.modules()
        for attribute, parameter in part._parameters.items()
        if is_stack(names[id(part)], part, attribute)
    ]


def _embeds(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Embedding) for part in module.modules())


def _num_experts(names: dict[int, str], name: str, module: nn.Module) -> int:
    """How many experts a module holds by itself: fused in a parameter, or in a list called so; 0 for none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) if "expert" in name else 0
    own = (len(module._parameters[key]) for key in module._parameters if is_stack(names[id(module)], module, key))  # type: ignore[arg-type]
    return next(own, 0)


def _gives(module: nn.Module, sizes: set[int]) -> bool:
    """Whether a module has one matrix, with any of these numbers of rows."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    return len(matrices) == 1 and matrices[0].ndim == 2 and len(matrices[0]) in sizes
