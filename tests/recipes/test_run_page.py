"""The page of a run: what a browser shows of it, and the advice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rtl import RTLModel, RTLTrainer
from shared import run_page
from shared.controls import predictions
from shared.report import method_rows, routes_rows
from shared.run_page import Figures, Findings, advise, write_run_page
from tests.training.small_runs import DOMAINS, Images, image_model, make_labels_trainer, make_trainer


ROUTES = ["<script>alert(1)</script>", "ünï & co", "cat"]
HEADINGS = [
    *("What came out", "What was asked", "Figures", "Curves over rounds", "What tickets share and keep"),
    *("What tickets confuse", "Bytes and speed", "What to try next"),
]


class Page(HTMLParser):
    """A page as a browser reads it: its text, headings, tables as lines of cells, and the sources of what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [str(value) for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "h2":
            self.headings.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "h2" in self.open:
            self.headings[-1] += data
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data.strip()

    def table(self, *first: str) -> list[list[str]]:
        """The table whose first line begins so."""
        return next(table for table in self.tables if table[0][: len(first)] == list(first))


def write(trainer: RTLTrainer, file: Path, **changed: Any) -> Page:
    rounds = changed.get("rounds", trainer.rounds)
    controls = changed.get("controls", [])
    by_route = routes_rows([{"method": "RTL", **found} for found in rounds])
    tables = {"Methods": method_rows(rounds, controls), "Routes": by_route, "none": []}
    given = {"asked": {"routes": ROUTES, "sizes": {"cat": 1234}}, "tables": tables, "rounds": rounds, "controls": []}
    write_run_page(file, trainer, **{**given, **changed})
    return Page(file.read_text())


@pytest.fixture(autouse=True, scope="module")
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "_SECONDS", 0.1)
        yield


def trained(trainer: RTLTrainer) -> RTLTrainer:
    trainer.train()
    # As controls do, which train with the same trainer.
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    trainer.model.mask_bank[0] = [torch.zeros(shape, dtype=torch.bool) for shape in trainer.model.mask_bank.shapes]
    return trainer


@pytest.fixture(scope="module")
def membership(tmp_path_factory: pytest.TempPathFactory) -> RTLTrainer:
    return trained(make_trainer(tmp_path_factory.mktemp("membership"), image_model(routes=ROUTES)))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> RTLTrainer:
    """A trainer after a run; three of a route's five evaluation samples have label 0."""
    model = image_model(routes=ROUTES, ticket_task="labels", num_labels=2)
    evaluate = Images(15, seed=1, columns=DOMAINS)
    return trained(make_labels_trainer(tmp_path_factory.mktemp("labels"), model, evaluate=evaluate))


@pytest.fixture(scope="module")
def files(membership: RTLTrainer, labels: RTLTrainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of both runs, each alone in its folder."""
    written = {}
    for name, trainer in (("membership", membership), ("labels", labels)):
        written[name] = tmp_path_factory.mktemp("page") / "report.html"
        write(trainer, written[name])
    return written


def saved(trainer: RTLTrainer) -> RTLModel:
    return type(trainer.model).from_pretrained(Path(trainer.args.output_dir, "final"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["membership", "labels"])
def test_the_page_is_whole_and_loads_nothing(
    kind: str, files: dict[str, Path], membership: RTLTrainer, labels: RTLTrainer
) -> None:
    trainer, text = {"membership": membership, "labels": labels}[kind], files[kind].read_text()
    page = Page(text)
    assert page.headings == HEADINGS
    assert page.tags["script"] == 0 and page.tags["link"] == 0
    pictures = [source for source in page.sources if source != "final/README.md"]
    assert len(pictures) == (3 if kind == "membership" else 2)  # a single round gives no curve
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in pictures)
    assert "http" not in text and ROUTES[0] not in text
    assert ROUTES[0] in page.text and ["sizes", "cat: 1,234"] in page.tables[0]
    assert page.table("layer")[0][1:] == ROUTES
    density = saved(trainer).mask_bank.density(per_layer=True)
    assert [line[1:] for line in page.table("layer")[1:]] == [[f"{100 * x:.0f}" for x in of] for of in density]
    assert [line[0] for line in page.table("samples of a call")] == [
        "samples of a call",
        *("1", str(len(trainer.eval_dataset))),
    ]
    assert list(files[kind].parent.iterdir()) == [files[kind]]


@pytest.mark.slow
def test_confusion_of_membership_is_counted_over_the_highest_scores(
    membership: RTLTrainer, files: dict[str, Path]
) -> None:
    model, counts = saved(membership), Counter()
    for sample in membership.eval_dataset:
        with torch.no_grad():
            counts[sample["label"], int(model(sample["pixel_values"][None]).logits[0].argmax())] += 1
    matrix = Page(files["membership"].read_text()).table("route", *ROUTES)
    expected = [[name, *(str(counts[route, other]) for other in range(3))] for route, name in enumerate(ROUTES)]
    assert matrix[1:] == expected


def count_labels(trainer: RTLTrainer) -> Counter[tuple[int, int, int]]:
    """(route, label, answer) -> how many evaluation samples."""
    model, counts = saved(trainer), Counter()
    for sample in trainer.eval_dataset:
        with torch.no_grad():
            logits = model(sample["pixel_values"][None], route_ids=sample["domain"]).logits
        counts[sample["domain"], sample["labels"], int(logits.argmax())] += 1
    return counts


@pytest.mark.slow
def test_confusion_of_labels_is_counted_for_every_route(labels: RTLTrainer, files: dict[str, Path]) -> None:
    counts, tables = count_labels(labels), Page(files["labels"].read_text()).tables
    matrices = [table for table in tables if table[0] == ["label", "LABEL_0", "LABEL_1"]]
    assert [[line[1:] for line in matrix[1:]] for matrix in matrices] == [
        [[str(counts[route, label, answer]) for answer in range(2)] for label in range(2)] for route in range(3)
    ]


@pytest.mark.slow
def test_many_routes_have_the_commonest_mistakes_and_the_extremes_of_layers(
    labels: RTLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_page, "_MOST_ROUTES", 2)
    monkeypatch.setattr(run_page, "_MOST_LINES", 2)
    page = write(labels, tmp_path / "report.html")
    wrong = {key: count for key, count in count_labels(labels).items() if key[1] != key[2]}
    named = {(ROUTES[route], f"LABEL_{label}", f"LABEL_{answer}"): n for (route, label, answer), n in wrong.items()}
    mistakes = page.table("of route", "label", "answer", "samples")[1:]
    assert [int(line[-1]) for line in mistakes] == sorted(wrong.values(), reverse=True)[:2]
    assert all(named[tuple(line[:-1])] == int(line[-1]) for line in mistakes)
    density = saved(labels).mask_bank.density(per_layer=True)
    fewest = sorted(density.amin(1).argsort()[:2].tolist())
    expected = [[f"{100 * x:.0f}" for x in (of.min(), of.mean(), of.max())] for of in density[fewest]]
    layers = page.table("layer", "least", "mean", "most")[1:]
    assert layers == [[f"conv{layer + 1}", *of] for layer, of in zip(fewest, expected, strict=True)]
    assert "the 2 of 3 layers" in page.text


@pytest.mark.slow
def test_accuracies_are_beside_those_of_a_constant_answer(files: dict[str, Path]) -> None:
    page = Page(files["labels"].read_text())
    assert page.table("method", "sparsity", *ROUTES)[-1] == ["a constant answer", "", *["0.600"] * 3]
    methods = page.table("method", "sparsity", "accuracy")
    line = dict(zip(methods[0], methods[-1], strict=True))
    assert [line[title] for title in ("accuracy", "worst route", "union acc.", "bytes")] == [*["0.600"] * 3, ""]
    methods = Page(files["membership"].read_text()).table("method", "sparsity", "bal. acc.")
    line = dict(zip(methods[0], methods[-1], strict=True))
    assert [line[title] for title in ("bal. acc.", "precision", "K-way acc.")] == ["0.500", "0.333", "0.333"]


@pytest.mark.slow
def test_without_matplotlib_the_page_has_tables(
    membership: RTLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_page, "find_spec", lambda name: None)
    monkeypatch.setattr(run_page, "advise", lambda found: [])
    page = write(membership, tmp_path / "report.html")
    assert page.headings == HEADINGS and page.tags["img"] == 0 and "matplotlib is not installed" in page.text
    assert [line[0] for line in page.table("round", "first loss")[1:]] == ["1", "2"]
    similarity = saved(membership).mask_bank.similarity()
    assert page.table("ticket", *ROUTES)[1:] == [
        [name, *(f"{value:.2f}" for value in of)] for name, of in zip(ROUTES, similarity, strict=True)
    ]
    assert page.text.endswith("Nothing in these figures asks for a change.")


@pytest.mark.slow
def test_a_run_with_a_loss_alone_has_no_confusion(
    labels: RTLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_page, "predictions", None)
    rounds = [{**labels.rounds[-1], "metrics": {"eval_loss": 2.5}}]
    controls = [{"method": "dense", "sparsity": 0.0, "metrics": {"eval_loss": 2.25}}]
    page = write(labels, tmp_path / "report.html", rounds=rounds, controls=controls, tables={})
    assert page.headings == [heading for heading in HEADINGS if heading != "What tickets confuse"]
    assert "a loss of 2.500; a dense model reaches 2.250." in page.text and "0.250 behind" in page.text


@pytest.mark.slow
def test_all_processes_predict_and_the_main_one_writes(
    membership: RTLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = []
    monkeypatch.setattr(membership, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(run_page, "predictions", lambda *given: predicted.append(given) or predictions(*given))
    with pytest.raises(FileNotFoundError):
        write(membership, tmp_path / "report.html")
    assert len(predicted) == 1 and list(tmp_path.iterdir()) == []


GOOD = {
    "sparsity": 0.5,
    "tickets": Figures("accuracy", 0.9, "cat", 0.82),
    "dense": Figures("accuracy", 0.91, "cat", 0.8),
    "rival": (0.85, "random masks"),
    "constant": 0.5,
    "losses": [1.0, 0.9, 0.8, 0.7, 0.4, 0.4, 0.39, 0.39],
    "similarity": 0.6,
    "chance": 0.4,
    "num_emptied": 0,
    "num_constant": 0,
    "num_samples": {"cat": 40, "dog": 1000},
}
NAN = float("nan")
UNKNOWN = (NAN, "")
LOSS = {"rival": UNKNOWN, "constant": NAN}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"num_emptied": 2}, "worst ticket: 2; .*--prune_scope layer"),
        ({"num_constant": 1}, "to every sample: 1. .*--prune_scope layer"),
        ({"dense": Figures("accuracy", 0.93)}, "0.030 behind the dense model in accuracy.*lower --target_sparsity"),
        ({"tickets": Figures("loss", 2.5), "dense": Figures("loss", 2.4), **LOSS}, "0.100 behind.*in loss"),
        ({"tickets": Figures("loss", 2.4), "dense": Figures("loss", 2.5), **LOSS}, None),
        ({"dense": Figures("", NAN), "rival": UNKNOWN, "losses": [], "similarity": NAN, "chance": NAN}, None),
        ({"rival": (0.9, "random masks")}, "control “random masks” reaches 0.900"),
        ({"constant": 0.89}, "hardly better than a constant answer, whose mean accuracy is 0.890"),
        ({"losses": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]}, "falling, by 36%.*--num_train_epochs"),
        ({"losses": [1.0, 0.5, 0.4, 0.3]}, None),
        ({"similarity": 0.41}, "no more than chance .*0.410, by chance 0.400"),
        ({"similarity": 0.99}, "nearly the same .*--extraction_epochs"),
        ({"similarity": 0.99, "searches": False}, "nearly the same .*--calibration_samples"),
        ({"similarity": 0.41, "searches": False}, "no more than chance .*compare.py --one_pass"),
        ({"dense": Figures("accuracy", 0.93), "is_retrained": False}, "0.030 behind.*, or --retrain_tickets"),
        ({"similarity": 1.0, "chance": 0.99}, None),
        ({"tickets": Figures("accuracy", 0.9, "cat", 0.7)}, "Route cat is far behind: 0.700.*40 of 1,040 training"),
    ],
)
def test_advice_follows_from_the_figures(change: dict[str, Any], words: str | None) -> None:
    advice = advise(Findings(**{**GOOD, **change}))
    assert len(advice) == (words is not None)
    assert words is None or re.search(words, advice[0])


def test_no_more_than_four_sentences_are_given() -> None:
    worst = {"dense": Figures("accuracy", 0.99), "num_emptied": 1, "rival": (0.95, "random masks"), "similarity": 0.4}
    advice = advise(Findings(**{**GOOD, **worst, "losses": list(range(80, 0, -1))}))
    assert len(advice) == 4 and "without a weight" in advice[0]
