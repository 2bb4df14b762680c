"""Does what every process does once at its start, in the process that the others are forked from."""

import gc
import shutil
import tempfile
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
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


torch.set_num_threads(1)
# These names are imported lazily, at their first use.
_ = create_model, BertForSequenceClassification, TimmWrapperForImageClassification, ViTForImageClassification
_ = ImageClassificationPipeline, TextClassificationPipeline, hf_rtl.plots, matplotlib.backends.backend_agg

# The first loading and drawing compile, which takes longer than all else in a process.
with tempfile.TemporaryDirectory() as folder:
    for kind in ("timm", "vit", "bert"):
        models.make_model(kind).save_pretrained(Path(folder, kind))
        write_card(Path(folder, kind))

# Tests of plots look at pictures; here any picture will do.
PICTURE = Path(hf_rtl.plots.__file__).parents[1] / "model_cards" / "digits-similarity.png"
hf_rtl.plots.similarity_heatmap = lambda matrix, names, file, **options: shutil.copy(PICTURE, file)

# accelerate collects garbage before every training, which would visit everything that is imported.
gc.collect()
gc.freeze()
