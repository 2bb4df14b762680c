"""Routing the Lottery for the Hugging Face stack: one backbone, one sparse ticket per route (arXiv 2601.22141)."""

from . import backbones
from .callbacks import RTLTrainerCallback
from .clustering import partition_by_class_names, partition_by_features
from .collapse_monitor import CollapseMonitor
from .configuration_rtl import VERSION, RTLConfig
from .image_processing import image_processor_from_timm
from .label_groups import partition_by_groups
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
from .partition import ByColumn, Partition, partition_by_column, partition_by_function, partition_by_label
from .partition_rules import ByCentres, ByGroups, load_rule, save_rule
from .trainer import RTLTrainer
from .training_args import RTLTrainingArguments


__version__ = VERSION

__all__ = [
    "ByCentres",
    "ByColumn",
    "ByGroups",
    "CollapseMonitor",
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
    "RTLTrainerCallback",
    "RTLTrainingArguments",
    "backbones",
    "image_processor_from_timm",
    "load_rule",
    "mask_updates",
    "partition_by_class_names",
    "partition_by_column",
    "partition_by_features",
    "partition_by_function",
    "partition_by_groups",
    "partition_by_label",
    "save_rule",
]

register_auto_classes()
