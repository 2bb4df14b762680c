"""
Mixtures of experts: which parameters stack the matrices of several experts, which layers choose among them, and what
the matrices of an expert are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn.functional import linear


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


@dataclass(frozen=True)
class ExpertInputs:
    """
    What the matrices of a stack are given.

    Args:
        parts (`list[Tensor]`): for each expert `[its positions, channels]`.
        num_positions (`int`): how many positions there are, whichever experts they go to.
    """

    parts: list[Tensor]
    num_positions: int


def are_fused(module: Any) -> bool:
    """
    Whether a module holds experts that follow the interface of transformers (`use_experts_implementation`): it says
    how their matrices lie and what stands between them, so that they can be measured. With a norm after each expert,
    what an expert gives is no sum over its neurons.
    """
    return hasattr(module, "_apply_gate") and getattr(module, "has_post_expert_norm", None) is False


def fused_matrices(experts: Any) -> tuple[str, str]:
    """The parameters of fused experts that make their neurons, and that read them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def unknown_experts(backbone: nn.Module) -> list[str]:
    """The names of stacked parameters of other experts."""
    return [
        f"{name}.{attribute}".lstrip(".")
        for name, module in backbone.named_modules()
        for attribute in module._parameters
        if is_stack(name, module, attribute) and not are_fused(module)
    ]


def expert_inputs(experts: Any, attribute: str, x: Tensor, chosen: Tensor, shares: Tensor) -> ExpertInputs:
    """
    What the matrices of fused experts are given, whichever implementation computes them.

    Args:
        experts (`nn.Module`): see [`are_fused`].
        attribute (`str`): one of its [`fused_matrices`]. What is given to the one that reads neurons is multiplied by
            the share of the expert in the output, since the output is.
        x (`Tensor`), chosen (`Tensor`), shares (`Tensor`): what the experts are given: `[positions, channels]`, and
            for each position the experts that it goes to, and their shares.
    """
    parts = []
    for expert in range(len(experts.down_proj)):
        positions, slots = (chosen == expert).nonzero(as_tuple=True)
        own = x[positions]
        if attribute == "down_proj":
            own = _neurons(experts, expert, own) * shares[positions, slots, None]
        parts.append(own)
    return ExpertInputs(parts, len(x))


def _neurons(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What the neurons of an expert give."""
    name, _ = fused_matrices(experts)
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    hidden = linear(x, weight.T if experts.is_transposed else weight, bias)
    return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)


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
