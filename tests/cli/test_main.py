"""The help and the usage errors of `hf-rtl`, and how fast they are shown."""

import re

import pytest

from hf_rtl_cli.main import main
from tests.child_processes import run_program


COMMANDS = [
    [],
    ["inspect"],
    ["similarity"],
    ["predict"],
    ["export"],
    ["card"],
    ["push"],
    ["tickets"],
    ["tickets", "list"],
    ["tickets", "add"],
    ["tickets", "drop"],
    ["tickets", "save"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_and_does_not_wait_for_torch(command):
    """In a process of its own: here torch is imported already."""
    program = (
        "import sys; from hf_rtl_cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'hf_rtl'} & set(sys.modules)"
    )
    result = run_program(program, *command, "--help", check=False)
    assert result.returncode == 0 and result.stderr == ""
    name = " ".join(["hf-rtl", *command])
    assert result.stdout.startswith(f"usage: {name}")
    # `tickets` needs an action; the help of each action has the examples.
    assert command == ["tickets"] or re.search(rf"examples:\n  {name}", result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["look"],
        ["inspect"],
        ["predict", "MODEL"],
        ["export", "MODEL", "OUT"],
        ["tickets"],
        ["tickets", "drop", "MODEL"],
        ["card", "--x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_apart_from_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.startswith("usage: hf-rtl")
