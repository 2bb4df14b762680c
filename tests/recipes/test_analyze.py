"""`recipes/analyze.py` on a small run."""

import json
import shutil
import sys

import analyze
import matplotlib
import numpy as np
import pytest
import torch

from hf_rtl import RTLModel
from hf_rtl.analysis import semantic_alignment, similarity_by_depth, ticket_similarity
from hf_rtl.plots import similarity_heatmap
from pages import card
from shared.points import ordering
from tests.training.small_runs import ROUTES, run


CLASSES = ",cat,bee,ant\ncat,1,0.1,0.9\nbee,0.1,1,0.2\nant,0.9,0.2,1\n"
ROUNDS = ["round-01-sparsity-0.3", "round-02-sparsity-0.6"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Two rounds, of two and of three prune events."""
    folder = tmp_path_factory.mktemp("analysed") / "run"
    return run(folder, target_sparsity=[0.3, 0.6], prune_amount=0.2, extraction_steps=2, max_steps=3), folder


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(*arguments)` returns the output."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
        analyze.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(monkeypatch, capsys):
    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            analyze.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return refused


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("shared.plots.draw_points", lambda *arguments: None)


@pytest.mark.slow
def test_a_run_is_analysed(finished_run, tmp_path, call):
    trainer, folder = finished_run
    classes = tmp_path / "classes.csv"
    classes.write_text(CLASSES)
    printed = call(folder, "--class_similarity", classes)
    found = json.loads((folder / "analysis" / "analysis.json").read_text())
    names = [point["masks"] for point in found["points"]]
    assert names == ["event 1", ROUNDS[0], "event 3", "event 4", ROUNDS[1]]
    assert [point["sparsity"] for point in found["points"]] == pytest.approx([0.2, 0.3, 0.44, 0.552, 0.6], abs=1e-3)
    assert found["judged"] and set(found["changes"]) == set(ROUTES) and found["metric"] == "balanced_accuracy"
    for name, report in zip(ROUNDS, trainer.rounds, strict=True):
        point = found["points"][names.index(name)]
        bank = RTLModel.from_pretrained(folder / name).mask_bank
        expected = ticket_similarity(bank)
        names_of_fields = {"spread": "deviation"}
        for key in ("similarity", "chance", "uniform_chance", "excess", "spread"):
            values = getattr(expected, names_of_fields.get(key, key))
            assert list(point[key].values()) == pytest.approx(values) and list(point[key]) == ROUTES
        assert point["jaccard"] == expected.jaccard.tolist()
        assert list(point["layers"]) == bank.weight_names
        assert point["metric"] == {r: report["metrics"][f"eval_{r}/balanced_accuracy"] for r in ROUTES}
        matrix = np.array([[1, 0.2, 0.9], [0.2, 1, 0.1], [0.9, 0.1, 1]])  # in the order of the routes
        for depth, similarity in similarity_by_depth(bank).items():
            aligned = semantic_alignment(similarity, matrix)
            assert point["alignment"][depth]["rho"] == pytest.approx(aligned.rho)
            assert point["alignment"][depth]["p_value"] == aligned.p_value
            pairs = [similarity[i, j] for i in range(3) for j in range(i)]
            assert point["depths"][depth] == pytest.approx(sum(pairs) / 3)
        assert f"{expected.similarity.mean():.3f}" in printed and f"{expected.excess.mean():.3f}" in printed
        assert f"{np.mean(list(point['metric'].values())):.3f}" in printed
    assert found["points"][0]["metric"] == dict.fromkeys(ROUTES)  # events without a round are not evaluated
    assert found["class_similarity"] == matrix.tolist()
    assert found["order"] in (["bee", "ant", "cat"], ["cat", "ant", "bee"])  # similar routes are neighbours
    order = [ROUTES.index(name) for name in found["order"]]
    masks = torch.tensor(expected.jaccard[np.ix_(order, order)])
    for name, values, chance, label in (
        ("similarity.png", masks, bank.chance_similarity(), "Jaccard similarity of two tickets"),
        ("class_similarity.png", torch.tensor(matrix[np.ix_(order, order)]), None, "similarity of two classes"),
    ):
        similarity_heatmap(values, found["order"], tmp_path / name, chance=chance, label=label)
        assert (tmp_path / name).read_bytes() == (folder / "analysis" / name).read_bytes()
    assert [line.split()[:2] for line in printed.splitlines() if line.split()[:1] == ["bee"]] == [["bee", "none"]]
    drawn = {file.name for file in (folder / "analysis").glob("*.png")}
    of_depth = {"similarity-shallow.png", "similarity-middle.png", "similarity-deep.png"}
    assert drawn == {"curves.png", "similarity.png", "class_similarity.png", *of_depth}
    for name in drawn:
        height, width, _ = matplotlib.image.imread(folder / "analysis" / name).shape
        assert min(height, width) > 300


@pytest.mark.slow
def test_saved_models_are_analysed_by_sparsity(finished_run, tmp_path, call):
    _, folder = finished_run
    printed = call(folder / ROUNDS[1], folder / ROUNDS[0], "--output_dir", tmp_path / "out", "--metric", "auroc")
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [point["masks"] for point in found["points"]] == ROUNDS
    assert not found["judged"] and "2 points say nothing; 5 are needed" in printed
    assert found["class_similarity"] is None and found["points"][0]["alignment"] is None and "Alignment" not in printed
    assert found["points"][0]["metric"]["ant"] is not None and found["metric"] == "auroc"
    assert not (tmp_path / "out" / "class_similarity.png").exists()
    assert sorted(found["order"]) == ROUTES


@pytest.mark.slow
def test_a_run_whose_events_are_gone_has_its_rounds(finished_run, tmp_path, call, without_pictures):
    _, folder = finished_run
    shutil.copytree(folder, tmp_path / "run")
    shutil.move(tmp_path / "run" / "extraction", tmp_path / "elsewhere")
    call(tmp_path / "run")
    file = tmp_path / "run" / "analysis" / "analysis.json"
    assert [point["masks"] for point in json.loads(file.read_text())["points"]] == ROUNDS
    call(tmp_path / "run", "--extraction_dir", tmp_path / "elsewhere")
    assert len(json.loads(file.read_text())["points"]) == 5
    # The run has not finished the fourth event, which lacks a route.
    next((tmp_path / "elsewhere" / "event-003").iterdir()).unlink()
    call(tmp_path / "run", "--extraction_dir", tmp_path / "elsewhere")
    assert len(json.loads(file.read_text())["points"]) == 3


@pytest.mark.slow
def test_heatmaps_are_of_the_masks_that_are_asked_for(finished_run, tmp_path, call, monkeypatch):
    _, folder = finished_run

    def draw_all_layers(matrix, names, file, **options):
        if file.name == "similarity.png":
            similarity_heatmap(matrix, names, file, **options)

    monkeypatch.setattr("shared.plots.similarity_heatmap", draw_all_layers)
    monkeypatch.setattr("shared.plots.route_curves", lambda *arguments, **options: None)
    for name, sparsity in (("last", []), ("also", ["--at", 0.61]), ("first", ["--at", 0.1])):
        call(folder, "--output_dir", tmp_path / name, *sparsity)
    drawn = {name: (tmp_path / name / "similarity.png").read_bytes() for name in ("last", "also", "first")}
    assert drawn["last"] == drawn["also"] != drawn["first"]


@pytest.mark.slow
def test_a_sharp_change_is_said(finished_run, tmp_path, call, monkeypatch, without_pictures):
    _, folder = finished_run
    change = analyze.Change(3, 0.552, "down", 0.4, 0.41, 0.1)
    monkeypatch.setattr(analyze, "detect_collapse", lambda points: {"ant": change})
    printed = call(folder, "--output_dir", tmp_path)
    assert "ant  down at 55.2%: excess 0.400 before, 0.100 found, 0.410 expected" in printed
    assert json.loads((tmp_path / "analysis.json").read_text())["changes"]["ant"]["direction"] == "down"


@pytest.mark.slow
def test_what_cannot_be_analysed_is_refused(finished_run, tmp_path, refused):
    _, folder = finished_run
    classes = tmp_path / "classes.csv"
    classes.write_text(",cat,bee\ncat,1,0.1\nbee,0.1,1\n")
    assert "lacks the route(s) 'ant'" in refused(folder, "--class_similarity", classes)
    assert "has no index.noun" in refused(folder, "--class_similarity", tmp_path)
    assert "are equally sparse" in refused(folder / ROUNDS[1], folder / "final")
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "run.json", tmp_path / "run")
    assert "has no masks yet" in refused(tmp_path / "run")
    assert not (tmp_path / "run" / "analysis").exists()


def test_similar_routes_are_neighbours():
    similarity = np.full((6, 6), 0.1)
    for group in ((0, 3), (1, 4), (2, 5)):
        similarity[np.ix_(group, group)] = 0.9
    order = ordering(similarity)
    assert {tuple(sorted(order[start : start + 2])) for start in (0, 2, 4)} == {(0, 3), (1, 4), (2, 5)}
    assert ordering(np.eye(2)) == [0, 1]


def test_help_teaches(refused, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze.py", "--help"])
    with pytest.raises(SystemExit):
        analyze.main()
    printed = capsys.readouterr().out
    for words in ("--class_similarity", "apt-get install wordnet-base", "excess: similarity - chance", "Mantel test"):
        assert words in printed


@pytest.mark.slow
def test_analyses_of_seeds_are_made_into_a_card(finished_run, tmp_path, call, monkeypatch):
    _, folder = finished_run
    classes = tmp_path / "classes.csv"
    classes.write_text(CLASSES)
    call(folder, "--class_similarity", classes, "--output_dir", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    changed = json.loads((tmp_path / "two" / "analysis.json").read_text())
    changed["points"][0]["excess"] = {route: 0.5 for route in ROUTES}
    changed["points"][0]["alignment"]["deep"]["rho"] = None
    changed["changes"]["cat"] = {"point": 4}
    (tmp_path / "two" / "analysis.json").write_text(json.dumps(changed))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "some.md").write_text(
        "{num_alarms} of {num_tickets}\n\n{figures}\n\n{alignment}\n\n![curves](some-curves.png)\n"
    )
    monkeypatch.setattr(card, "MODEL_CARDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["card.py", "some", str(tmp_path / "one"), str(tmp_path / "two")])
    card.main()
    first = json.loads((tmp_path / "one" / "analysis.json").read_text())["points"]
    page = (tmp_path / "some.md").read_text()
    assert page.startswith("1 of 6\n") and [file.name for file in tmp_path.glob("some-*.png")] == ["some-curves.png"]
    kept = json.loads((tmp_path / "some-results.json").read_text())
    lines, aligned = kept["figures"], kept["alignment"]
    values = [np.mean(list(first[0]["excess"].values())), 0.5]
    assert lines[0]["excess"] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" and lines[0]["excess"] in page
    p_values = {depth: first[1]["alignment"][depth]["p_value"] for depth in ("all", "deep")}
    assert {depth: aligned[1][f"p, {depth}"] for depth in p_values} == {
        d: f"{p:.3f} ± 0.000" for d, p in p_values.items()
    }
    assert aligned[0]["deep"] is None and lines[0]["metric"] is None
    rho = first[1]["alignment"]["all"]["rho"]
    assert aligned[1]["all"] == f"{rho:.3f} ± 0.000" and aligned[1]["all"] in page
    assert lines[1]["deep"] == f"{first[1]['depths']['deep']:.3f} ± 0.000" and "all" not in lines[1]
    accuracy = np.mean(list(first[1]["metric"].values()))
    assert lines[1]["metric"] == f"{accuracy:.3f} ± 0.000"
