"""
Damage files of models, tickets, rules, runs and cards at random, and see what comes of reading them.

    python -m tests.fuzz
    python -m tests.fuzz --only config,tickets --cases 2000 --seed 7
    python -m tests.fuzz --repeat '{"kind": "config", "folder": 0, "mutations": [["set", 0, 17, 1099511627776]]}'

A file must be refused by an error that names it, or be read into what its hashes say (`oracle.py`). Files are read in
processes that may take 2 GB of memory and 10 seconds; one that dies is a finding. Each finding is shown with the
command that repeats it, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tabulate import tabulate

from tests.child_processes import fork
from tests.fuzz.campaign import OUTCOMES, SHARES, Results, fuzz, in_words, worker
from tests.fuzz.folders import write_folders


MARK = "<!-- make fuzz writes here -->"
PACKAGES = ("torch", "transformers", "timm", "safetensors", "huggingface_hub", "hypothesis")


def main() -> int:
    arguments = parse()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        seeds = Path(folder, "seeds")
        written = fork(write_folders, seeds, output=Path(folder, "log"))
        written.join()
        if written.exitcode:
            sys.exit(Path(folder, "log").read_text())
        if arguments.repeat is not None:
            with worker(seeds) as one:
                verdict = one.ask(arguments.repeat)
            print(verdict["came"], *verdict["done"], verdict.get("signature", ""), verdict.get("detail", ""), sep="\n")
            return int(verdict["came"] == "found")
        found = run(seeds, arguments.only, arguments.cases, arguments.seed, arguments.processes)
    result = table(found, arguments.seed, time.perf_counter() - start)
    print(result)
    if arguments.page is not None:
        write_result(arguments.page, result)
    return int(any(results.findings for results in found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many cases, of all kinds (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="how many read at a time (default: 2)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(SHARES), help=f"kinds, of {','.join(SHARES)}"
    )
    parser.add_argument("--page", type=Path, help="a page to write the result into, between two marks")
    parser.add_argument("--repeat", type=json.loads, help="read this one case")
    return parser.parse_args()


def run(seeds: Path, kinds: Sequence[str], number: int, seed: int, processes: int) -> list[Results]:
    """All cases, in several workers at a time; each has a part of the cases of every kind."""
    shares = {kind: SHARES[kind] / sum(SHARES[kind] for kind in kinds) for kind in kinds}

    def work(part: int) -> list[Results]:
        found = []
        with worker(seeds) as one:
            for kind in kinds:
                start = time.perf_counter()
                results = fuzz(kind, round(number * shares[kind] / processes), seed * processes + part, one)
                for finding in results.findings.values():
                    print(in_words(*finding, seed), end="\n\n")
                seconds = time.perf_counter() - start
                print(f"process {part}: {results.counts.total()} cases of {kind}, {seconds:.0f} seconds", flush=True)
                found.append(results)
        return found

    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(work, range(processes)))
    merged = []
    for results in zip(*parts, strict=True):
        first = results[0]
        for other in results[1:]:
            first.counts += other.counts
            first.findings = {**other.findings, **first.findings}
        merged.append(first)
    return merged


def table(found: Sequence[Results], seed: int, seconds: float) -> str:
    """What came of all cases, as Markdown: counts by kind, and under which circumstances."""
    rows = [[results.kind, results.counts.total(), *(results.counts[name] for name in OUTCOMES)] for results in found]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    counts = tabulate(rows, headers=["files", "cases", *OUTCOMES], tablefmt="github", intfmt=",")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{counts}\n\nSeed {seed}, {date.today()}, {seconds:.0f} seconds; {versions}.\n"


def write_result(page: Path, result: str) -> None:
    """Writes the result into a page, between its two marks."""
    before, _, rest = page.read_text().partition(MARK)
    page.write_text(f"{before}{MARK}\n\n{result}\n{MARK}{rest.partition(MARK)[2]}")


if __name__ == "__main__":
    sys.exit(main())
