"""The modules and parameters of a backbone: found once, and found again only after one was replaced."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from .norm_statistics import tracked_buffers
from .prunable import parameter_aliases, parameter_at


class ModuleTree:
    """
    What `backbone` consists of at this moment. Walking a network takes as long as a small layer; asking whether it is
    still the same takes a fraction of that.

    Args:
        backbone (`nn.Module`): any network.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.named_modules = dict(backbone.named_modules())
        self.aliases = parameter_aliases(backbone)
        self.is_offloaded = any(parameter.is_meta for parameter in backbone.parameters())
        # The attribute has one name in transformers, another in timm.
        self._checkpointing = [
            (module, name)
            for module in self.named_modules.values()
            for name in ("gradient_checkpointing", "grad_checkpointing")
            if hasattr(module, name)
        ]
        self.tracked_buffers = list(tracked_buffers(backbone))
        self.tracking_layers = list(dict.fromkeys(module for module, _ in self.tracked_buffers))
        # A module without parts can be replaced, which shows in the module that holds it.
        self._tables: list[dict[str, Any]] = [
            table for module in self.named_modules.values() for table in (module._modules, module._parameters) if table
        ]
        self._tables += [layer._buffers for layer in self.tracking_layers]
        self._held = self._in_tables()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter_at(places[0]) for places in self.aliases.values()]

    def statistics(self) -> list[Tensor]:
        """The layers' own running statistics, in the order of `tracked_buffers`."""
        return [module._buffers[name] for module, name in self.tracked_buffers]  # type: ignore[misc]

    def is_checkpointing(self) -> bool:
        """Whether any module recomputes activations in backward."""
        return any(getattr(module, name) for module, name in self._checkpointing)

    def is_current(self) -> bool:
        """Whether no module, no parameter and no running statistics were added, removed or replaced since."""
        held = self._in_tables()
        return len(held) == len(self._held) and all(map(operator.is_, held, self._held))

    def __reduce__(self):
        return ModuleTree, (self.backbone,)

    def _in_tables(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))
