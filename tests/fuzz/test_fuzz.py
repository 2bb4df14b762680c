"""A sample of `make fuzz`, and checks that it would find what it looks for."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.child_processes import environment, fork
from tests.fuzz.__main__ import MARK, table, write_result
from tests.fuzz.__main__ import run as run_all
from tests.fuzz.campaign import SHARES, Results, in_words, worker
from tests.fuzz.folders import CHANGED, write_folders
from tests.fuzz.mutations import NUM_FOLDERS, PLANTED, TENSOR_CHANGES, apply
from tests.fuzz.oracle import MOST_BYTES, Broken, Watch, is_refusal, limited_memory, listing, signature


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Whole folders of all kinds."""
    folder = tmp_path_factory.mktemp("fuzz")
    written = fork(write_folders, folder / "seeds", output=folder / "log")
    written.join()
    assert written.exitcode == 0, (folder / "log").read_text()
    return folder / "seeds"


def test_damaged_files_are_refused_or_read_whole(seeds, say):
    found = run_all(seeds, list(SHARES), 120, seed=0, processes=1)
    assert [in_words(*finding, 0) for results in found for finding in results.findings.values()] == []
    counts = {results.kind: dict(results.counts) for results in found}
    assert all(kind["refused"] for kind in counts.values()) and sum(kind["loaded"] for kind in counts.values()) > 20
    say(f"damaged files: {counts}")


def test_undamaged_files_are_read(seeds):
    with worker(seeds) as one:
        for kind in SHARES:
            for folder in range(NUM_FOLDERS):
                verdict = one.ask({"kind": kind, "folder": folder, "mutations": []})
                assert verdict["came"] == "loaded", (kind, folder, verdict)


def test_a_process_that_dies_is_a_finding_and_the_next_case_is_read(seeds):
    with worker(seeds) as one:
        verdict = one.ask({"kind": "no such kind", "folder": 0, "mutations": []})
        assert verdict["came"] == "found" and "dies (1)" in verdict["signature"]
        assert "FileNotFoundError" in verdict["detail"]
        assert one.ask({"kind": "rules", "folder": 0, "mutations": []})["came"] == "loaded"


MUTATIONS = [
    *(["set", 0, 1, 2**40], ["remove", 0, 1], ["rename", 0, 1, "x"], ["add", 0, 1, "x", None], ["copy", 0, 1, 2]),
    *(["nest", 0, 1, 400], ["nest", 0, 1, 10**5], ["repeat", 0, 1, 3], ["flip", 0, 1, 3], ["cut", 0, 1, 8]),
    *(["insert", 0, 1, "\ud800"], *(["tensor", 0, 1, how, int(how != "rename")] for how in TENSOR_CHANGES)),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: str(mutation[0]) + str(mutation[3:])[:20])
def test_a_mutation_changes_one_file(seeds, tmp_path, mutation):
    copied = tmp_path / "copied"
    kind = "weights" if mutation[0] == "tensor" else "config"
    subprocess.run(["cp", "-r", seeds / kind / "2", copied], check=True)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    (done,) = apply(copied, [mutation], CHANGED[kind])
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == [done.split(" ")[0]]


# What must be seen


def test_what_is_run_or_written_outside_is_seen(tmp_path):
    """In a process of its own, since Python cannot forget that it is watched."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / f"{PLANTED}.py").write_text("")
    program = "from tests.fuzz.test_fuzz import watch_everything; watch_everything()"
    result = subprocess.run(
        [sys.executable, "-c", program, inside], env=environment(), capture_output=True, text=True, check=True
    )
    seen = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert seen == {
        "nothing": "",
        "write inside": "",
        "write outside": "writes outside the folder: open of outside",
        "remove outside": "writes outside the folder: os.remove of outside",
        "pickle": "runs pickle.find_class ('builtins',)",
        "import": f"runs {PLANTED}.py",
        "program": "runs subprocess.Popen ('true',)",
    }


def watch_everything():
    inside = Path(sys.argv[1])
    sys.path.insert(0, str(inside))
    outside, pickled, watch = inside.parent / "outside", pickle.dumps(print), Watch()
    for name, act in {
        "nothing": lambda: (inside / f"{PLANTED}.py").read_text(),
        "write inside": lambda: (inside / "new").write_text("x"),
        "write outside": lambda: outside.write_text("x"),
        "remove outside": outside.unlink,
        "pickle": lambda: pickle.loads(pickled),
        "import": lambda: importlib.import_module(PLANTED),
        "program": lambda: subprocess.run(["true"]),
    }.items():
        try:
            with watch.watching(inside):
                act()
            print(f"{name}: ")
        except Broken as error:
            print(f"{name}: {error}")


def test_memory_that_is_taken_and_given_back_is_seen():
    with limited_memory(1000):
        np.ones(MOST_BYTES // 16)
    with pytest.raises(Broken, match="takes .* MiB of memory for a folder of 0.0 MiB"):
        with limited_memory(1000):
            np.ones(MOST_BYTES // 4)


def test_an_error_is_of_our_kind_if_it_says_what_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for text in (
        f"{str(tmp_path)!r} is damaged.",
        "config.json is damaged.",
        "`prunable` is 5.",
        "it lacks hidden_size.",
    ):
        assert is_refusal(ValueError(text), tmp_path, {"hidden_size"})
        assert not is_refusal(KeyError(text), tmp_path, {"hidden_size"})
    assert not is_refusal(ValueError("too many values to unpack (expected 2)"), tmp_path, {"hidden_size"})


def test_findings_differ_by_their_error_and_its_line():
    def sign(function):
        try:
            function()
        except Exception as error:
            return signature(error)

    assert sign(lambda: json.loads("x")) == sign(lambda: json.loads("y")) != sign(lambda: json.loads('{"a"'))


def test_a_change_of_any_file_is_listed(tmp_path):
    (tmp_path / "file").write_text("x")
    before = listing(tmp_path)
    assert listing(tmp_path) == before
    os.utime(tmp_path / "file", ns=(0, 0))
    assert listing(tmp_path) != before


def test_the_result_is_written_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{MARK}\n{MARK}\n\n## Next\n")
    results = Results("rules", Counter(refused=3, loaded=1))
    for seed in (1, 2):
        write_result(page, table([results], seed, 60.4))
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{MARK}\n\n| files ") and text.endswith(f"{MARK}\n\n## Next\n")
    assert text.count("Seed 2") == 1 and "Seed 1" not in text and "60 seconds" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        ["files", "cases", "refused", "loaded", "answers not", "found"],
        ["rules", "4", "3", "1", "0", "0"],
        ["all", "4", "3", "1", "0", "0"],
    ]
