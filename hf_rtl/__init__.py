"""Routing the Lottery for the Hugging Face stack: one backbone, one sparse ticket per route (arXiv 2601.22141)."""

from . import backbones, model_card
from .clustering import partition_by_class_names, partition_by_features
from .data.partition import Partition
from .data.partition_by import partition_by_column, partition_by_function, partition_by_groups, partition_by_label
from .data.rules import ByCentres, ByColumn, ByGroups, load_rule, save_rule
from .get_model import get_rtl_model
from .modeling import hub
from .modeling.configuration_rtl import VERSION, RTLConfig
from .modeling.image_processing import image_processor_from_timm
from .modeling.mask_bank import MaskBank
from .modeling.modeling_rtl import (
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
from .pipelines import routed_pipeline
from .training.callbacks import CollapseMonitor, RTLTrainerCallback
from .training.find_tickets import find_tickets
from .training.optim import MaskedAdamW, MaskedSGD, mask_updates
from .training.trainer import RTLTrainer
from .training.training_args import RTLTrainingArguments


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
    "find_tickets",
    "get_rtl_model",
    "image_processor_from_timm",
    "load_rule",
    "mask_updates",
    "partition_by_class_names",
    "partition_by_column",
    "partition_by_features",
    "partition_by_function",
    "partition_by_groups",
    "partition_by_label",
    "routed_pipeline",
    "save_rule",
]

register_auto_classes()
hub.card_writer = model_card
