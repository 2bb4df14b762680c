"""Shows lines of the tests of several processes, such as the real number of processes, after a test run."""

from collections.abc import Callable

import pytest


_LINES: list[str] = []


@pytest.fixture
def say() -> Callable[[str], None]:
    """Adds a line to the summary of the test run."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LINES:
        terminalreporter.section("what the processes did")
        for line in _LINES:
            terminalreporter.write_line(line)
