"""The configurations of the commands, and those of `accelerate launch`."""

from __future__ import annotations

import re

import baselines
import collapse
import domains
import inr
import languages
import prune
import pytest
import speech
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_rtl import RTLTrainingArguments
from tests.recipes.commands import RECIPES


@pytest.mark.parametrize("config", sorted(path.name for path in (RECIPES / "configs").glob("*.yaml")))
def test_configurations_name_existing_arguments(config: str) -> None:
    # The first line names the recipe, unless it is prune.py.
    of_recipes = {
        "prune": (prune.ModelArguments, prune.ReportArguments, prune.DataArguments),
        "baselines": (baselines.ComparisonArguments, baselines.DataArguments),
        "collapse": (collapse.CollapseArguments, collapse.DataArguments),
        "domains": (domains.DomainArguments, domains.DataArguments),
        "inr": (inr.ComparisonArguments, inr.SceneArguments),
        "languages": (languages.LanguageArguments, languages.DataArguments),
        "speech": (speech.ComparisonArguments, speech.SpeechArguments),
    }
    named = re.search(r"for recipes/(\w+)\.py", (RECIPES / "configs" / config).read_text().splitlines()[0])
    classes = (*of_recipes[named[1] if named else "prune"], RTLTrainingArguments)
    known = {name for cls in classes for name in cls.__dataclass_fields__}
    values = yaml.safe_load((RECIPES / "configs" / config).read_text())
    assert set(values) <= known


# Name -> (type, machines, processes).
LAUNCHES = {
    "cpu.yaml": ("NO", 1, 1),
    "one_gpu.yaml": ("NO", 1, 1),
    "multi_gpu.yaml": ("MULTI_GPU", 1, 2),
    "multi_node.yaml": ("MULTI_GPU", 2, 16),
}


@pytest.mark.parametrize("name", sorted(path.name for path in (RECIPES / "accelerate").iterdir()))
def test_accelerate_reads_its_configurations(name: str) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / name))
    kind, machines, processes = LAUNCHES[name]
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.use_cpu == (name == "cpu.yaml")
    if machines > 1:
        assert config.main_process_ip and config.main_process_port and config.machine_rank == 0
