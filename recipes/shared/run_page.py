"""The page of a run: what was asked, what came out and what to try next, as one HTML file without scripts."""

from __future__ import annotations

import base64
import os
import tempfile
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from hf_rtl import MaskBank, RTLModel, RTLTrainer
from hf_rtl.metrics import label_metrics, membership_metrics
from hf_rtl.modeling.files import write_bytes
from hf_rtl.modeling.footprint import FOOTPRINT_FORMS
from hf_rtl.plots import similarity_heatmap

from .controls import CONTROL_MASKS, predictions
from .models import model_of_round
from .report import command_line, method_rows, routes_rows, row, table, without_prefix


_MOST_ROUTES, _MOST_LABELS = 12, 20  # of matrices
_MOST_LINES = 40  # of the matrix of layers and the table of mistakes
_MOST_ADVICE = 4
_SECONDS, _CALLS = 2.0, 30  # of timing at most, and of each size of batch
_UNKNOWN = float("nan")
_CONSTANT = "a constant answer"  # the name of its line


def write_run_page(
    file: Path,
    trainer: RTLTrainer,
    *,
    asked: Mapping[str, Any],
    tables: Mapping[str, list[dict[str, Any]]],
    rounds: list[dict[str, Any]],
    controls: list[dict[str, Any]],
) -> None:
    """
    Writes the page of a finished run. All processes call it, since all predict; the main process writes. The file is
    never half-written. Without matplotlib it has tables in place of pictures.

    Args:
        file (`Path`): the page, beside the folder `final`.
        trainer ([`RTLTrainer`]): after `train()`, with a single evaluation set. Controls may have changed its model.
        asked: what was asked, in words -> value.
        tables: title -> lines as `report.table` takes them. Lines of methods get one of a constant answer.
        rounds: the reports of the trainer's rounds, with their `log_history`.
        controls: the reports of controls and of a dense model; may be empty.
    """
    model = model_of_round(trainer, rounds[-1]).to(trainer.args.device)
    answers = None
    # With a prediction per token, there would be as many scores as a vocabulary has words, for every token.
    if trainer.preprocess_logits_for_metrics is None and figures(rounds[-1]).metric != "loss":
        scores, labels = predictions(trainer, model)
        answers = scores.argmax(axis=1), labels, trainer.eval_partition(trainer.eval_dataset).route_ids
    if not trainer.is_world_process_zero():
        return
    constant = None if answers is None else _constant_answer(model, *answers[1:])
    logged = (entry for entry in rounds[-1]["log_history"] if "loss" in entry)
    losses = {
        number: [(entry["step"], entry["loss"]) for entry in entries]
        for number, entries in groupby(logged, itemgetter("round"))
    }
    found = _findings(trainer, model.mask_bank, rounds[-1], [*controls, *([constant] if constant else [])], losses)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["table"] = lambda lines: Markup(table(lines, style="html"))  # tabulate escapes
    here = Path(__file__)
    page = environment.from_string(here.with_name("run_page.html").read_text()).render(
        style=here.with_name("page.css").read_text(),
        model=model,
        found=found,
        command=command_line(),
        asked={name: _words(value) for name, value in asked.items() if value is not None},
        tables={title: _with_constant(lines, constant) for title, lines in tables.items() if lines},
        losses=losses,
        has_pictures=find_spec("matplotlib") is not None,
        pictures=_pictures(model.mask_bank, rounds, controls, losses) if find_spec("matplotlib") else {},
        **_masks(model.mask_bank),
        **_confused(model, answers),
        sizes=[
            {
                "form": FOOTPRINT_FORMS[form].format(model.num_routes).replace("`", ""),
                "bytes": rounds[-1]["footprint"][form],
            }
            for form in ("full_bytes", "compact_bytes", "independent_full_bytes")
        ],
        times=_times(trainer, model),
        timed_on=f"{trainer.args.device} (CPU threads: {torch.get_num_threads()})",
        advice=advise(found),
    )
    write_bytes(file, page.encode())


class Figures(NamedTuple):
    """The metric that decides: its mean over routes, and the worst route. Tasks without classes have a loss alone."""

    metric: str
    mean: float
    route: str = ""
    worst: float = _UNKNOWN


@dataclass
class Findings:
    """
    What the rules of advice read, of the last round; NaN is unknown. `rival` is the best of the masks that no route
    chose, at the same sparsity, `constant` the mean of a constant answer, and `losses` are those of joint retraining.
    """

    sparsity: float
    tickets: Figures
    dense: Figures
    rival: tuple[float, str]
    constant: float
    losses: Sequence[float]
    similarity: float
    chance: float
    num_emptied: int
    num_constant: int
    num_samples: Mapping[str, int]
    is_retrained: bool = True
    searches: bool = True  # whether tickets are trained before they are chosen

    @property
    def more_training(self) -> str:
        return "longer joint retraining (--num_train_epochs)" if self.is_retrained else "--retrain_tickets"

    @property
    def more_search(self) -> str:
        return "--extraction_epochs" if self.searches else "--calibration_samples"

    @property
    def controls(self) -> str:
        return "--sanity" if self.searches else "compare.py --one_pass"

    @property
    def behind(self) -> float:
        """How much better the dense model is."""
        difference = self.dense.mean - self.tickets.mean
        return -difference if self.tickets.metric == "loss" else difference

    @property
    def falling(self) -> float:
        """The fraction by which the mean loss fell from the third to the last quarter of the joint retraining."""
        quarter = len(self.losses) // 4
        if quarter < 2:  # a single loss is that of a single route
            return _UNKNOWN
        return 1 - mean(self.losses[-quarter:]) / mean(self.losses[-2 * quarter : -quarter])

    @property
    def samples_of_worst(self) -> str:
        return f"{self.num_samples[self.tickets.route]:,} of {sum(self.num_samples.values()):,} training samples"


# When to say what, in this order. A comparison with NaN is false.
_RULES: tuple[tuple[Callable[[Findings], bool], str], ...] = (
    (
        lambda found: found.num_emptied + found.num_constant > 0,
        "Layers without a weight in the worst ticket: {0.num_emptied}; tickets that answer the same to every sample: "
        "{0.num_constant}. Try --prune_scope layer, or a lower --target_sparsity.",
    ),
    (
        lambda found: found.tickets.mean - found.constant <= 0.02,
        "The tickets are hardly better than a constant answer, whose mean {0.tickets.metric} is {0.constant:.3f}: try "
        "more --num_train_epochs, or another --learning_rate.",
    ),
    (
        lambda found: found.behind > 0.02,
        "Tickets are {0.behind:.3f} behind the dense model in {0.tickets.metric}: try a lower --target_sparsity, or "
        "{0.more_training}.",
    ),
    (
        lambda found: found.rival[0] >= found.tickets.mean and found.tickets.metric != "loss",
        "The control “{0.rival[1]}” reaches {0.rival[0]:.3f} at the same sparsity, so which weights a ticket keeps "
        "has not helped: try more --extraction_epochs.",
    ),
    (
        lambda found: found.falling > 0.05,
        "The training loss was still falling, by {0.falling:.0%} from the third to the last quarter of joint "
        "retraining: try more --num_train_epochs.",
    ),
    (
        lambda found: found.similarity - found.chance <= 0.02 and found.chance < 0.9,
        "Tickets share no more than chance (similarity {0.similarity:.3f}, by chance {0.chance:.3f}), as if noise had "
        "chosen their weights: see with {0.controls} whether random masks do as well.",
    ),
    (
        lambda found: found.similarity >= 0.98 and found.chance < 0.9,
        "Tickets are nearly the same (similarity {0.similarity:.3f}): maybe the data of the routes do not differ, or "
        "the search was too short to tell them apart; try more {0.more_search}.",
    ),
    (
        lambda found: found.tickets.mean - found.tickets.worst > 0.1,
        "Route {0.tickets.route} is far behind: {0.tickets.worst:.3f}, against {0.tickets.mean:.3f} in the mean. It "
        "has {0.samples_of_worst}: try more, or join it with a route that it is confused with.",
    ),
)


def advise(found: Findings) -> list[str]:
    """What to try next, most important first; empty if nothing is wrong."""
    return [sentence.format(found) for applies, sentence in _RULES if applies(found)][:_MOST_ADVICE]


def figures(report: Mapping[str, Any]) -> Figures:
    """The deciding figures of a report."""
    metrics = without_prefix(report["metrics"])
    for name, over_routes in (("balanced_accuracy", "balanced_accuracy"), ("accuracy", "mean_route_accuracy")):
        of_routes = {key.removesuffix(f"/{name}"): value for key, value in metrics.items() if key.endswith(f"/{name}")}
        measured = [(value, route) for route, value in of_routes.items() if value == value]
        if measured:
            worst, route = min(measured)
            return Figures(name.replace("_", " "), metrics[over_routes], route, worst)
    return Figures("loss", metrics["loss"])


def _findings(
    trainer: RTLTrainer,
    bank: MaskBank,
    report: dict[str, Any],
    others: list[dict[str, Any]],
    losses: Mapping[int, Any],
) -> Findings:
    """The findings of the last round's `report`. `others` are the reports of controls and of a constant answer."""
    same = {other["method"]: figures(other) for other in others if other["sparsity"] in (None, 0, report["sparsity"])}
    unknown, line = Figures("", _UNKNOWN), row("RTL", None, report)
    rivals = [(same[name].mean, name) for name in (*CONTROL_MASKS, "single mask") if name in same]
    pairs = ~torch.eye(bank.num_routes, dtype=torch.bool)
    return Findings(
        sparsity=report["sparsity"],
        tickets=figures(report),
        dense=next((of for name, of in same.items() if name.startswith("dense")), unknown),
        rival=max(rivals, default=(_UNKNOWN, "")),
        constant=same.get(_CONSTANT, unknown).mean,
        losses=[loss for _, loss in losses.get(report["round"], [])],
        similarity=_UNKNOWN if report["mean_similarity"] is None else report["mean_similarity"],
        chance=float(bank.chance_similarity().cpu()[pairs].nanmean()),
        num_emptied=line["emptied layers"] or 0,
        num_constant=line["constant tickets"] or 0,
        num_samples=trainer.plan().route_sizes,
        is_retrained="one_pass" not in report,
        searches=trainer.args.extraction_steps != 0,
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return f"{value:,}" if type(value) is int else str(value)


def _constant_answer(model: RTLModel, labels: np.ndarray, route_ids: np.ndarray) -> dict[str, Any]:
    """
    The report of answers that never read their input: the commonest label, of its route where that is given. A
    membership ticket always says yes.
    """
    names, size = model.route_names, model.config.num_labels
    logits = np.eye(size)[[np.bincount(labels).argmax()] * len(labels)]
    if model.config.ticket_task == "membership":
        metrics = membership_metrics(logits + 1, labels, names, thresholds=[0.0] * size)
    else:
        commonest = [np.bincount(labels[route_ids == route], minlength=size).argmax() for route in range(len(names))]
        metrics = label_metrics(np.eye(size)[np.array(commonest)[route_ids]], labels, route_ids, names)
        metrics |= label_metrics(logits, labels, route_ids, names, prefix="union_")
        metrics |= label_metrics(logits, labels, route_ids, names, prefix="inferred_")
    metrics["route_accuracy"] = float(np.bincount(route_ids).max() / len(route_ids))
    return {"method": _CONSTANT, "sparsity": None, "metrics": metrics}


def _with_constant(lines: list[dict[str, Any]], constant: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Lines of methods, and one of a constant answer in their columns of fractions. Other lines stay as they are."""
    if constant is None or "method" not in lines[0]:
        return lines
    fractions = {title for line in lines for title, value in line.items() if isinstance(value, float)} - {"sparsity"}
    cells = ChainMap(*method_rows([], [constant]), *routes_rows([constant]))
    return [*lines, {"method": _CONSTANT, **{title: cells[title] for title in cells if title in fractions}}]


def _pictures(
    bank: MaskBank, rounds: list[dict[str, Any]], controls: list[dict[str, Any]], losses: Mapping[int, Any]
) -> dict[str, str]:
    """Name -> a PNG as a data URI. A single round has no curve, a single ticket no pairs."""
    from .plots import draw_losses, draw_rounds

    draw: dict[str, Callable[[Path], None]] = {}
    rows = method_rows(rounds, controls)
    if len(rounds) > 1 and {"bal. acc.", "accuracy"} & rows[0].keys():
        draw["curve"] = partial(draw_rounds, rows, {found["sparsity"]: found["mean_similarity"] for found in rounds})
    if losses:
        draw["losses"] = partial(draw_losses, losses)
    if bank.num_routes > 1:
        chance = bank.chance_similarity()
        draw["similarity"] = lambda file: similarity_heatmap(bank.similarity(), bank.route_names, file, chance=chance)
    pictures = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.png")
        for name, draw_into in draw.items():
            draw_into(file)
            pictures[name] = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return pictures


def _matrix(
    corner: str, names: Sequence[str], columns: Sequence[str], values: np.ndarray, shares: np.ndarray, form: str
) -> dict[str, Any]:
    """A table of numbers `[rows, columns]`, shaded by `shares` from 0 to 1."""
    lines = [
        (name, [(form.format(value), share) for value, share in zip(*line, strict=True)])
        for name, *line in zip(names, values, shares, strict=True)
    ]
    return {"corner": corner, "columns": columns, "lines": lines}


def _masks(bank: MaskBank) -> dict[str, Any]:
    """Matrices: the similarity of tickets, `None` if they are too many, and the percentage of layers they keep."""
    names, similarity = bank.route_names, bank.similarity().cpu().numpy()
    density, columns = bank.density(per_layer=True).cpu().numpy(), names
    layers = sorted(density.min(axis=1).argsort(kind="stable")[:_MOST_LINES])
    if len(names) > _MOST_ROUTES:
        density = np.stack([density.min(axis=1), density.mean(axis=1), density.max(axis=1)], axis=1)
        columns = ["least", "mean", "most"]
    start = os.path.commonprefix(bank.weight_names).rfind(".") + 1
    shown = [bank.weight_names[layer][start:].removesuffix(".weight") for layer in layers]
    is_small = 1 < len(names) <= _MOST_ROUTES
    return {
        "pairs": _matrix("ticket", names, names, similarity, similarity, "{:.2f}") if is_small else None,
        "kept": _matrix("layer", shown, columns, 100 * density[layers], density[layers], "{:.0f}"),
        "num_layers": len(bank.weight_names),
    }


def _confused(model: RTLModel, answers: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> dict[str, Any]:
    """
    `confusions`: a matrix for every route, or a single one for membership tickets. If they are too many or too large,
    `mistakes`: lines of the most frequent ones. `answers`: answers, labels and routes of samples, `[N]` each.
    """
    if answers is None:
        return {"confusions": {}, "mistakes": []}
    answered, labels, route_ids = answers
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    parts, corner = {name: route_ids == route for route, name in enumerate(model.route_names)}, "label"
    if model.config.ticket_task == "membership":
        parts, corner = {"": np.full(len(labels), True)}, "route"
    if len(parts) > _MOST_ROUTES or len(names) > _MOST_LABELS:
        wrong = Counter(
            (name or None, names[label], names[answer])
            for name, part in parts.items()
            for label, answer in zip(labels[part], answered[part], strict=True)
            if label != answer
        )
        titles = ("of route", corner, "answer")
        mistakes = [{**dict(zip(titles, of, strict=True)), "samples": n} for of, n in wrong.most_common(_MOST_LINES)]
        return {"confusions": {}, "mistakes": mistakes}
    confusions = {}
    for name, part in parts.items():
        pairs = labels[part] * len(names) + answered[part]
        counts = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        confusions[name] = _matrix(corner, names, names, counts, shares, "{}")
    return {"confusions": confusions, "mistakes": []}


@torch.no_grad()
def _times(trainer: RTLTrainer, model: RTLModel) -> list[dict[str, Any]]:
    """Lines of the median milliseconds of a call with a ticket and of the backbone alone, in turn, for two batches."""
    lines, collate, start = [], trainer.collate_alone(), time.perf_counter()
    for turn, size in enumerate((1, 32), start=1):
        samples = [trainer.eval_dataset[index] for index in range(min(size, len(trainer.eval_dataset)))]
        batch = {name: value.to(model.device) for name, value in collate(samples).items()}
        if not model.backbone.config.is_encoder_decoder:  # whose decoder reads the labels
            batch.pop("labels", None)
        calls = {
            f"ticket of route {model.route_names[0]}": partial(model, **batch, route_ids=0),
            "backbone alone": partial(model.backbone, **batch),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        with trainer.compute_loss_context_manager():
            for _ in range(_CALLS):
                for name, call in calls.items():
                    before = time.perf_counter()
                    call()[0].flatten()[0].item()  # waits for the device
                    times[name].append(1000 * (time.perf_counter() - before))
                if time.perf_counter() - start > turn * _SECONDS / 2:
                    break
        # The first call also unpacks the masks.
        medians = {name: median(of_calls[1:]) for name, of_calls in times.items() if of_calls[1:]}
        lines.append({"samples of a call": len(samples), **medians})
    return lines
