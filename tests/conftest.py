"""What all tests share: no network, no downloads, no progress bars, and which worker has which tests."""

import gc
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


# Read by the libraries when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# UMAP compiles for 20 seconds what takes one in Python on data as small as that of tests.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

# Folders and files whose tests one worker has: their processes are forked from one that takes long to start, or they
# remember the units of the same networks.
TOGETHER = {
    "tests/hub/": "hub",
    "tests/distributed/": "processes",
    "tests/fuzz/": "processes",
    "tests/recipes/": "processes",
    "tests/modeling/test_refit.py": "units",
    "tests/modeling/test_small_ticket.py": "units",
    "tests/modeling/test_standalone.py": "units",
    "tests/modeling/test_ticket_cache.py": "units",
    "tests/modeling/test_unit_coding.py": "units",
    "tests/modeling/test_units.py": "units",
    "tests/training/test_find_tickets": "units",
}
SAID = "said"


def pytest_configure(config: pytest.Config) -> None:
    """Imports the libraries, unless this process only hands out tests to workers. Imports leave no garbage."""
    gc.disable()
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    All tests with a Hub or with several processes are slow. What has the most slow tests comes first, so that workers
    end at about the same time.
    """
    folders = [Path(__file__).with_name(name) for name in ("hub", "distributed")]
    num_slow: Counter[str] = Counter()
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker("slow")
        num_slow[_scope(item.nodeid)] += "slow" in item.keywords and "long" not in item.keywords
    items.sort(key=lambda item: -num_slow[_scope(item.nodeid)])


def _scope(nodeid: str) -> str:
    """The name of the tests that one worker has."""
    return next((name for begin, name in TOGETHER.items() if nodeid.startswith(begin)), nodeid.split("::")[0])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile`, but some folders are like one file, and files keep their order."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Adds a line to the summary of the test run."""
    return partial(record_property, SAID)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests say, such as the real number of processes."""
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    lines = [line for report in called for name, line in report.user_properties if name == SAID]
    if lines:
        terminalreporter.section("what the processes did")
        for line in lines:
            terminalreporter.write_line(line)
