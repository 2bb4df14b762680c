"""The quick start of the README with the published package."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.child_processes import ROOT
from tests.hub.clients.pipelines import compute_answers
from tests.hub.clients.repositories import push
from tests.hub.environments import backbone_packages


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PROGRAM = """
import json, sys
from importlib.metadata import distribution

import hf_rtl
import torch

namespace = {"images": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
exec(sys.argv[1], namespace)
commands = [command.name for command in distribution("hf_rtl").entry_points if callable(command.load())]
print(json.dumps([hf_rtl.__file__, namespace["logits"].tolist(), commands]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_the_quick_start_runs_as_it_is_shown(hub, run, published_environment, tmp_path):
    section = re.search(r"^## Quick start\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    (code,) = re.findall(r"^```python no-run\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    (name,) = re.findall(r'from_pretrained\("(.*?)"\)', code)
    run(push, name, "timm", route_names=CLASSES)

    printed = published_environment.run("-c", PROGRAM, code, url=hub.url, folder=tmp_path / "reader")
    file, logits, commands = json.loads(printed)
    assert commands == ["hf-rtl"]
    assert Path(file) == published_environment.site_packages / "hf_rtl" / "__init__.py"
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = run(compute_answers, name, images.unsqueeze(1), ["cat", "frog", "cat"])
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert len({row[0] for row in expected}) == 3


@pytest.mark.slow
def test_the_published_package_is_whole(published_environment):
    def files(folder):
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }

    for package in backbone_packages(ROOT):
        assert files(published_environment.site_packages / package.name) == files(package)
