"""The processes that stand for the users of a Hub."""

from pathlib import Path

from tests.child_processes import ROOT, package_file


def test_users_have_the_hf_rtl_of_this_checkout(run):
    assert Path(run(package_file)) == ROOT / "hf_rtl" / "__init__.py"
