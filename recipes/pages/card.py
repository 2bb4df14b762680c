"""
Render a card in model_cards/ from the results of runs, and keep a copy of these results beside it.

    export PYTHONPATH=recipes    # in the root of the repository
    python -m pages.card digits runs/digits
    python -m pages.card scaling
    python -m pages.card cifar10_methods runs/cifar10_methods
    python -m pages.card inr runs/inr
    python -m pages.card speech runs/speech
    python -m pages.card languages runs/languages
    python -m pages.card digits_collapse runs/digits_collapse
    python -m pages.card cifar10_similarity runs/cifar10_methods/seed-[012]/per-route/analysis
    python -m pages.card sentiment runs/sentiment-[012] --names "seed 0" "seed 1" "seed 2"
    python -m pages.card resnet_cifar runs/resnet runs/resnet-one-pass --names rounds one_pass

Every number of the card comes from the results.json of a run. The card of every run's final model is kept too, with
its picture; `recipes/pages/render_card.py` renders it as HTML.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from hf_rtl.model_card import write_card
from hf_rtl.modeling.files import write_bytes, write_json
from shared.report import over_seeds, table


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
ANALYSIS = "analysis.json"  # written by recipes/analyze.py
_KEPT_OF_A_REPORT = (
    *("method", "image", "seed", "learning_rate", "round", "sparsity", "at", "metrics", "train_loss", "costs"),
    *("quality", "active", "bytes"),
    *("psnr", "psnr_of_regions", "pixels_of_regions", "similarity_of_regions"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", help="name of the card, whose template is model_cards/templates/NAME.md")
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        help="output folders of prune.py or analyze.py, or one of another recipe; none: render from kept results",
    )
    parser.add_argument("--names", nargs="+", help="a name for each run, added to its methods")
    arguments = parser.parse_args()
    names = arguments.names or [""] * len(arguments.runs)
    kept = MODEL_CARDS / f"{arguments.card}-results.json"
    if arguments.runs and (arguments.runs[0] / ANALYSIS).exists():
        results = {"": comparison_of_seeds(arguments.runs)}
    else:
        results = {
            name: json.loads((run / "results.json").read_text())
            for name, run in zip(names, arguments.runs, strict=True)
        }
    comparison = next((result for result in results.values() if "figures" in result), None)
    if len(results) > 1 and all("sentences" in result for result in results.values()):
        write_kept(kept, {name: verdict_alone(result) for name, result in results.items()})
    elif comparison is not None and len(results) > 1:
        parser.error("the results of such a comparison make a card by themselves; give one folder.")
    elif comparison is not None:
        write_kept(kept, comparison)
        template = (MODEL_CARDS / "templates" / f"{arguments.card}.md").read_text()
        for picture in comparison.get("pictures", []):
            if f"]({arguments.card}-{picture})" in template:
                keep_picture(arguments.runs[0] / picture, MODEL_CARDS / f"{arguments.card}-{picture}")
    elif results:
        write_json(kept, results)
        for name, run in zip(names, arguments.runs, strict=True):
            keep_pages(arguments.card, name, run)
    (MODEL_CARDS / f"{arguments.card}.md").write_text(render(arguments.card))


def write_kept(file: Path, comparison: dict[str, Any]) -> None:
    """Writes the results of a comparison with what tables and pictures are made of; a small record takes one line."""
    kept = dict(comparison)
    if "runs" in kept:
        kept["runs"] = {seed: [kept_report(report) for report in runs] for seed, runs in kept["runs"].items()}
    if "reports" in kept:
        kept["reports"] = [kept_report(report) for report in kept["reports"]]
    # Strings in JSON hold no line breaks, so none is changed.
    short = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda record: record[0].replace("\n", " "), json.dumps(kept, indent=0))
    write_bytes(file, f"{short}\n".encode())


def verdict_alone(comparison: dict[str, Any]) -> dict[str, Any]:
    """The results of compare.py without the figures of every seed."""
    return _rounded({name: value for name, value in comparison.items() if name != "figures"})


def kept_report(report: dict[str, Any]) -> dict[str, Any]:
    """What the card of a comparison keeps of a report: no metric of a single route, four digits of a number."""
    kept = {name: report[name] for name in _KEPT_OF_A_REPORT if name in report}
    if "metrics" in kept:
        kept["metrics"] = {name: value for name, value in kept["metrics"].items() if "/" not in name}
    return _rounded(kept)


def keep_picture(source: Path, target: Path) -> None:
    """Copies a picture in 256 colours, which takes a third of the bytes."""
    picture = Image.open(source).convert("RGB").quantize(256)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_bytes(target, buffer.getvalue())


def comparison_of_seeds(folders: Sequence[Path]) -> dict[str, Any]:
    """The analyses of runs that differ in the seed, as the results of one comparison, with the first's pictures."""
    results = [json.loads((folder / ANALYSIS).read_text()) for folder in folders]
    tables = {
        "figures": over_seeds([[masks_line(point) for point in result["points"]] for result in results]),
        "alignment": over_seeds(
            [[alignment_line(point) for point in result["points"] if point["alignment"]] for result in results]
        ),
    }
    changes = [change for result in results for change in result["changes"].values()]
    return {
        "command": "\n".join(result["command"] for result in results),
        **{name: results[0][name] for name in ("python", "versions", "metric")},
        **tables,
        "num_tickets": len(changes),
        "num_alarms": sum(change is not None for change in changes),
        "num_analyses": len(results),
        "pictures": sorted(picture.name for picture in folders[0].glob("*.png")),
    }


def masks_line(point: dict[str, Any]) -> dict[str, Any]:
    """The means of a point of analysis.json: over tickets, and over pairs of tickets by depth."""
    measured = [value for value in point["metric"].values() if value is not None]
    return {
        "method": "tickets",
        "sparsity": round(point["sparsity"], 4),
        "metric": mean(measured) if measured else None,
        **{key: mean(point[key].values()) for key in ("similarity", "chance", "excess")},
        **{depth: similarity for depth, similarity in point["depths"].items() if depth != "all"},
        "emptied layers": sum(map(len, point["emptied_layers"].values())),
    }


def alignment_line(point: dict[str, Any]) -> dict[str, Any]:
    """The alignment of a point's tickets with the similarity of their classes, by depth."""
    found = point["alignment"]
    return {
        "method": "tickets",
        "sparsity": round(point["sparsity"], 4),
        **{depth: of_depth["rho"] for depth, of_depth in found.items()},
        **{f"p, {depth}": found[depth]["p_value"] for depth in ("all", "deep")},
    }


def keep_pages(card: str, name: str, run: Path) -> None:
    """Copies a run's picture and the rewritten card of its final model, under the names of card and run."""
    kept = "-".join([card, *name.split()])
    shutil.copy(run / "curve.png", MODEL_CARDS / f"{kept}-curve.png")
    text = write_card(run / "final").read_text()
    for file, target in (("similarity.png", f"{kept}-similarity.png"), ("training_args.json", f"{card}-results.json")):
        text = text.replace(f"]({file})", f"]({target})")
    (MODEL_CARDS / f"{kept}-model-card.md").write_text(text)
    shutil.copy(run / "final" / "similarity.png", MODEL_CARDS / f"{kept}-similarity.png")


def render(card: str) -> str:
    """The text of a card, from its template and its kept results."""
    results = json.loads((MODEL_CARDS / f"{card}-results.json").read_text())
    template = (MODEL_CARDS / "templates" / f"{card}.md").read_text()
    if "figures" in results:
        return template.format(**with_tables(results))
    first = next(iter(results.values()))
    if "sentences" in first:
        return template.format(**{name: with_tables(result) for name, result in results.items()})
    routes = first["rounds"][0]["kept"]
    if first.get("routes"):
        lines = over_seeds([result["table"] for result in results.values()])
        per_route = table(over_seeds([result["routes"] for result in results.values()]), style="github")
    else:
        lines = [line for name, result in results.items() for line in rows(name, result)]
        per_route = per_route_table(results)
    return template.format(
        commands="\n".join(result["command"] for result in results.values()),
        environment=", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        python=first["python"],
        num_test=f"{first['num_test']:,}",
        num_routes=len(routes),
        seed=", ".join(dict.fromkeys(str(result["training"]["seed"]) for result in results.values())),
        table=table(lines, style="github"),
        per_route=per_route,
        masks=masks_table(first),
    )


def with_tables(results: dict[str, Any]) -> dict[str, Any]:
    """The results with tables, and a list of sentences, as Markdown."""
    texts = {name: table(lines, style="github") for name, lines in results.items() if is_table(lines)}
    if "sentences" in results:
        texts["sentences"] = "\n".join(f"- {sentence}" for sentence in results["sentences"])
    return {**results, **texts}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def is_table(value: Any) -> bool:
    """Whether a value of results is a table: a list of lines, each a mapping."""
    return isinstance(value, list) and all(isinstance(line, dict) for line in value) and value != []


def rows(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run's table, with the run's name added to the methods."""
    return [{**line, "method": f"{line['method']}, {name}" if name else line["method"]} for line in result["table"]]


def per_route_table(results: dict[str, dict[str, Any]]) -> str:
    """Balanced accuracy of every ticket in every round."""
    lines = []
    for name, result in results.items():
        for report in result["rounds"]:
            line: dict[str, Any] = {"statistics": name, "sparsity": report["sparsity"]}
            for route in report["kept"]:
                line[route] = report["metrics"][f"eval_{route}/balanced_accuracy"]
            lines.append(line)
    return table(lines, style="github")


def masks_table(result: dict[str, Any]) -> str:
    """The table of every round's masks: sizes, similarity and emptied layers."""
    lines = [
        {
            "sparsity": report["sparsity"],
            "kept per ticket": next(iter(report["kept"].values())),
            "union": report["union"],
            "core": report["core"],
            "mean Jaccard": report["mean_similarity"],
            "bytes": report["footprint"]["total_bytes"],
            "bytes of independent models": report["footprint"]["independent_bytes"],
            "emptied layers (worst ticket)": max(map(len, report["emptied_layers"].values()), default=0),
        }
        for report in result["rounds"]
    ]
    return table(lines, style="github")


if __name__ == "__main__":
    main()
