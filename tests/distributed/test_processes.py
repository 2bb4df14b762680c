"""The processes that take part in a run."""

from pathlib import Path

from tests.child_processes import ROOT, package_file
from tests.distributed.processes import launch


def test_processes_have_the_hf_rtl_of_this_checkout(tmp_path):
    files = launch(package_file, world_size=2, logs=tmp_path / "logs")
    assert [Path(file) for file in files] == [ROOT / "hf_rtl" / "__init__.py"] * 2
