"""Does what every run does once at its start, in the server that the processes are forked from."""

import gc
import tempfile

import sklearn.metrics  # noqa: F401

import hf_rtl.plots
from hf_rtl.model_card import write_card
from hf_rtl.modeling import modeling_rtl
from tests.distributed import runs
from tests.modeling.small_backbones import units_found_once
from tests.pictures import put_picture


# Reading fonts, compiling in loading and so on take more time than all else in a run of these tests.
with tempfile.TemporaryDirectory() as folder:
    runs.make_model("timm").save_pretrained(folder)
    write_card(folder)

hf_rtl.plots.similarity_heatmap = put_picture

# All processes know the units of the transformer.
units_found_once(modeling_rtl)
runs.make_model("vit").unit_layers()

# accelerate collects garbage before every training, which would visit everything that is imported.
gc.collect()
gc.freeze()
