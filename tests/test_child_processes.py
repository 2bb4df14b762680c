"""Child processes of tests import the tested checkout. `hub` and `distributed` have their own tests of it."""

from pathlib import Path

import pytest

import hf_rtl
from tests.child_processes import ROOT, package_file, run_program


PROGRAM = "from tests.child_processes import package_file; print(package_file())"


def test_this_process_is_of_this_checkout():
    assert Path(package_file()) == Path(hf_rtl.__file__) == ROOT / "hf_rtl" / "__init__.py"


@pytest.mark.slow
def test_a_child_process_finds_this_checkout_wherever_it_runs(tmp_path, monkeypatch):
    """It finds it even if another `hf_rtl` could be imported, such as an installed one."""
    other = tmp_path / "installed" / "hf_rtl"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        for given in ({}, {"folder": tmp_path}):
            assert Path(run_program(PROGRAM, **given).stdout.strip()) == ROOT / "hf_rtl" / "__init__.py"
