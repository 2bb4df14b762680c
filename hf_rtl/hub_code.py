"""The code that a repository may carry, for who loads a model without this package and trusts it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

from timm.models import model_entrypoint
from transformers import PreTrainedModel, TimmWrapperConfig
from transformers.dynamic_module_utils import custom_object_save


logger = logging.getLogger(__name__)

_STOCK_PACKAGES = {"timm", "torch", "transformers"}


def packages_of(backbone: PreTrainedModel) -> list[str]:
    """The packages other than timm and transformers that a backbone is made with, in alphabetical order."""
    modules = {type(module).__module__ for module in backbone.modules()}
    if isinstance(backbone.config, TimmWrapperConfig):
        modules.add(model_entrypoint(backbone.config.architecture).__module__)
    return sorted({module.split(".")[0] for module in modules} - _STOCK_PACKAGES)


def save_code(model: Any, folder: Path) -> None:
    """
    Adds the code of a routed model to the folder that it was saved in, and names it in `config.json`.

    Only a copy is marked as custom code: the classes of this process stay as they are. If the backbone is of another
    package, which the folder cannot carry, nothing is added, and a warning says so.
    """
    packages = packages_of(model.backbone)
    if packages:
        logger.warning(
            f"the model is saved without code: its backbone is of {', '.join(packages)}, so that who loads it needs "
            f"that package, and `trust_remote_code=True` would not do. With it, `import {packages[0]}` first."
        )
        return
    file = folder / "config.json"
    config = json.loads(file.read_text())
    auto_classes = ((model.config, "AutoConfig"), (model, "AutoModel"), (model, model.backbone_class.__name__))
    for saved, auto_class in auto_classes:
        custom = copy.copy(saved)
        custom._auto_class = auto_class
        custom_object_save(custom, folder, config=config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
