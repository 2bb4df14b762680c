"""Routing the Lottery for the Hugging Face stack: one backbone, one sparse ticket per route (arXiv 2601.22141)."""

from . import backbones as _backbones  # registers our own backbones with timm
from .configuration_rtl import RTLConfig
from .mask_bank import MaskBank
from .modeling_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSemanticSegmentation,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
    register_auto_classes,
)


__version__ = "0.1.0.dev0"

register_auto_classes()
