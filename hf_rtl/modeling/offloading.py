"""
Tensors that stand in for parameters while layers compute, also for those that accelerate's hooks bring only then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .prunable import parameter_at


# Module and attribute of a parameter, and what stands in for it, or what makes that of it once it has arrived.
StandIn = tuple[nn.Module, str, Tensor | Callable[[Tensor], Tensor]]


def refuse_offloaded(model: nn.Module, action: str) -> None:
    """Raises `RuntimeError` if parameters of `model` are on the meta device, which `action` needs."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise RuntimeError(
            f"{action} needs the weights, and {len(absent)} parameters are offloaded, such as {absent[0]!r}: they are "
            "on the meta device. Load the model without offloading, as by `from_pretrained(path)`, for that. An "
            "extracted ticket can be offloaded in turn."
        )


def refuse_offloaded_buffers(buffers: Iterable[Tensor]) -> None:
    """Raises `RuntimeError` if one has no memory: hooks would put back their own statistics, and bring no masks."""
    if any(buffer.is_meta for buffer in buffers):
        raise RuntimeError(
            "masks or running statistics are offloaded, and a routed model needs them at hand: offload with "
            "`offload_buffers=False`, the default. They take a bit per weight and route."
        )


@contextlib.contextmanager
def standing_in(backbone: nn.Module, stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """
    Within the context, tensors stand in for parameters, which stay registered. Where a function is given instead,
    whenever a hook of accelerate has brought the parameter, what the function makes of it stands in for it while the
    hooked module computes.

    Raises:
        RuntimeError: no hook brings a parameter for which a function is given.
    """
    arrivals = {(module, attribute): make for module, attribute, make in stand_ins if not isinstance(make, Tensor)}
    # A hooked module calls its hook, then `_old_forward`, then its hook again.
    modules: Iterable[Any] = backbone.modules() if arrivals else ()
    originals = {module: module._old_forward for module in modules if "_old_forward" in module.__dict__}
    brought = {part for module in originals for part in module.modules()}
    for module, attribute in arrivals:
        if module not in brought:
            raise RuntimeError(
                f"`{attribute}` of a {type(module).__name__} is on the meta device, and nothing brings it: load the "
                "model by `from_pretrained`, or offload it by accelerate."
            )
    try:
        for module, attribute, tensor in stand_ins:
            if isinstance(tensor, Tensor):
                # An entry in `__dict__` hides the registered parameter of the same name from attribute access only.
                module.__dict__[attribute] = tensor
        for module, original in originals.items():
            parts = set(module.modules())
            inside = {place: make for place, make in arrivals.items() if place[0] in parts}
            module._old_forward = _masked_forward(original, inside)
        yield
    finally:
        for module, attribute, _ in stand_ins:
            module.__dict__.pop(attribute, None)
        for module, original in originals.items():
            module._old_forward = original


def _masked_forward(forward: Callable, arrivals: Mapping[tuple[nn.Module, str], Callable]) -> Callable:
    """`forward`, with what `arrivals` make in place of the parameters that are there when it is called."""

    def masked_forward(*args: Any, **kwargs: Any) -> Any:
        here = [place for place in arrivals if not parameter_at(place).is_meta and place[1] not in place[0].__dict__]
        try:
            for module, attribute in here:
                module.__dict__[attribute] = arrivals[module, attribute](parameter_at((module, attribute)))
            return forward(*args, **kwargs)
        finally:
            for module, attribute in here:
                module.__dict__.pop(attribute, None)

    return masked_forward
