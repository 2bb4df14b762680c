"""Does once what every run does first and once, for the server that the processes are forked from."""

import gc
import tempfile

import sklearn.metrics  # noqa: F401

from hf_rtl.model_card import write_card
from tests.distributed import runs


# matplotlib's fonts, what loading a model compiles, and so on: more work than all the rest of a run of these tests.
with tempfile.TemporaryDirectory() as folder:
    runs.make_model("timm").save_pretrained(folder)
    write_card(folder)

# accelerate collects garbage before every training, which would look at all that is imported.
gc.collect()
gc.freeze()
