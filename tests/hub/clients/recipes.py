"""Commands of recipes/ that push to the Hub."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor

from hf_rtl import RTLModel
from tests.child_processes import ROOT


RECIPES = ROOT / "recipes"


def prune_and_push(config: str, name: str) -> None:
    """Runs `recipes/prune.py` with a configuration, on a few images in class folders, and pushes the model."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 4)):
        for label, level in (("night", 40), ("day", 200)):
            folder = Path("images", split, label)
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.normal(level, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    command = [RECIPES / "prune.py", "--config", RECIPES / "configs" / config]
    command += ["--dataset", "images", "--input_column", "image", "--backbone", "test_resnet", "--output_dir", "run"]
    command += ["--target_sparsity", 0.5, "--num_train_epochs", 1, "--extraction_steps", 1, "--route_batch_size", 4]
    command += ["--no_dense", "--use_cpu", "--push_to_hub", "--hub_model_id", name]
    sys.argv = list(map(str, command))
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(sys.argv[0], run_name="__main__")


def answers(name: str) -> list[float]:
    """The scores of both tickets of a pushed model for a bright image, by the processor that was pushed along."""
    processor = AutoImageProcessor.from_pretrained(name)
    inputs = processor(Image.new("RGB", (32, 32), (200, 200, 200)), return_tensors="pt")
    assert tuple(inputs.pixel_values.shape) == (1, 3, 32, 32)
    model = RTLModel.from_pretrained(name).eval()
    return [model(**inputs, route_ids=route).logits.item() for route in model.route_names]
