"""Routing the Lottery for the Hugging Face stack: one backbone, one sparse ticket per route (arXiv 2601.22141)."""

from . import backbones
from .configuration_rtl import VERSION, RTLConfig
from .image_processing import image_processor_from_timm
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
from .optim import MaskedAdamW, MaskedSGD, mask_updates
from .partition import Partition, partition_by_column, partition_by_label
from .trainer import RTLTrainer
from .training_args import RTLTrainingArguments


__version__ = VERSION

__all__ = [
    "MaskBank",
    "MaskedAdamW",
    "MaskedSGD",
    "Partition",
    "RTLConfig",
    "RTLModel",
    "RTLModelForAudioClassification",
    "RTLModelForCausalLM",
    "RTLModelForImageClassification",
    "RTLModelForMaskedLM",
    "RTLModelForSemanticSegmentation",
    "RTLModelForSeq2SeqLM",
    "RTLModelForSequenceClassification",
    "RTLModelForTokenClassification",
    "RTLTrainer",
    "RTLTrainingArguments",
    "backbones",
    "image_processor_from_timm",
    "mask_updates",
    "partition_by_column",
    "partition_by_label",
]

register_auto_classes()
