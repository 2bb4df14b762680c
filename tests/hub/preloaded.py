"""Does what every process does once at its start, in the process that the others are forked from."""

import gc
import tempfile
from pathlib import Path

import torch
from timm.models import create_model
from transformers import (
    BertForSequenceClassification,
    ImageClassificationPipeline,
    TextClassificationPipeline,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
)

import hf_rtl.plots
from hf_rtl.model_card import write_card
from tests.hub.clients import (  # noqa: F401
    cards,
    commands,
    models,
    pipelines,
    repositories,
    rules,
    runs,
    tickets,
)
from tests.pictures import put_picture


torch.set_num_threads(1)
# These names are imported lazily, at their first use.
_ = create_model, BertForSequenceClassification, TimmWrapperForImageClassification, ViTForImageClassification
_ = ImageClassificationPipeline, TextClassificationPipeline
hf_rtl.plots.similarity_heatmap = put_picture

# The first loading compiles, which takes longer than all else in a process.
with tempfile.TemporaryDirectory() as folder:
    for kind in ("timm", "vit", "bert"):
        models.make_model(kind).save_pretrained(Path(folder, kind))
        write_card(Path(folder, kind))

# accelerate collects garbage before every training, which would visit everything that is imported.
gc.collect()
gc.freeze()
