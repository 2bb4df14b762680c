"""
A page to play with a model: what every ticket says of an image or a text, whose answer counts, and what tickets share.

    python recipes/space/app.py runs/digits/final --examples digits
    python recipes/space/app.py org/name

It shows models that classify images or texts and have their processor beside them; of others it says what they need.
It needs `pip install "hf_rtl[app]"`. README.md says how to push this folder to the Hub as a Space.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Pipeline

from hf_rtl import RTLModel, plots, routed_pipeline
from hf_rtl.modeling.footprint import FOOTPRINT_FORMS, human_bytes
from hf_rtl.modeling.masking import UNION
from hf_rtl_cli import classifiers
from hf_rtl_cli.models import load_config, load_model
from hf_rtl_cli.samples import read_image, read_text


# The model of a Space whose settings have no variable HF_RTL_MODEL.
MODEL = ""
# Tasks of the models that the page shows -> the files of examples.
FILES = {
    "image-classification": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "text-classification": (".txt",),
}
_SHOWN_LABELS = 6
_SHOWN_FORMS = ("compact_bytes", "full_bytes", "independent_compact_bytes", "independent_full_bytes")
_SHARED = "Weights that both keep, over those that either keeps: 1 is the same ticket. The scale begins at chance."
_KEPT = "A line per ticket: the share of the weights of a layer that it keeps, from the input to the output."
_STYLE = """<style>
.rtl { overflow: auto; max-height: 640px; }
.rtl-given img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.rtl table { border-collapse: collapse; width: 100%; }
.rtl th, .rtl td { padding: 4px 8px !important; font-size: 14px; text-align: left; }
.rtl td:has(.bar) { white-space: nowrap; }
.rtl .bar { display: inline-block; position: relative; width: clamp(36px, 8vw, 90px); height: 12px; margin-right: 8px;
            background: #8883; vertical-align: middle; }
.rtl .bar i { position: absolute; top: 0; left: 0; height: 12px; background: #0072b2; }
.rtl .bar b { position: absolute; top: -3px; height: 18px; width: 2px; background: #d55e00; }
.rtl .chosen { outline: 2px solid #e69f00; outline-offset: -2px; font-weight: bold; }
</style>"""


class Ticket(NamedTuple):
    """What one ticket says of a sample."""

    route: str
    scores: dict[str, float]  # label -> score, the highest first; membership has one
    threshold: float | None  # of a membership ticket: it says yes above this
    probability: float | None  # that the sample is of this route, if a router says so

    @property
    def score(self) -> float:
        return max(self.scores.values())

    @property
    def answer(self) -> str:
        if self.threshold is None:
            return next(iter(self.scores))
        return "yes" if self.score > self.threshold else "no"


class Answers(NamedTuple):
    """What all tickets say of a sample, in the order of routes. The union comes last, if it was the fallback."""

    tickets: list[Ticket]
    chosen: Ticket | None  # whose answer counts
    words: str  # how it was found


def load(name: str) -> Pipeline:
    """The model in a folder or repo, and its processor. Raises `ValueError` or `OSError` that says what is missing."""
    if not name:
        raise ValueError("no model is named: give one as `app.py MODEL`, or in the variable `HF_RTL_MODEL`.")
    config = load_config(name)
    task = classifiers.find_task(name, config, asker="this page", tasks=tuple(FILES))
    processor = classifiers.load_processor(name, classifiers.TASKS[task], config, {})
    return routed_pipeline(task, load_model(name), **{classifiers.TASKS[task].processor: processor})


def find_examples(task: str, folder: Path) -> list[str]:
    """Images of a folder as the names of their files, or the texts of a folder, in the order of the files' names."""
    files = sorted(str(file) for file in folder.glob("*") if file.suffix.lower() in FILES[task])
    return files if task == "image-classification" else [read_text(file) for file in files]


def ask(classify: Pipeline, sample: Any) -> Answers:
    """Asks every ticket, and the router if there is one. Raises `ValueError` if the model cannot take the sample."""
    model: Any = classify.model
    membership = model.config.ticket_task == "membership"
    options = classifiers.score_options(classify, top_k=model.config.num_labels)
    with classifiers.one_line_errors(model, "this input"):
        decision = None if model.router is None else model.infer_routes(**classifiers.make_inputs(sample, classify))
        indices = list(range(model.num_routes))
        if decision is not None and decision.route_ids.item() == UNION:
            indices.append(UNION)
        tickets = []
        for index in indices:
            found = classify(sample, route_ids=index, **options)
            scores = {answer["label"]: answer["score"] for answer in found}
            threshold = classifiers.score_threshold(model.config, index) if membership else None
            known = decision is not None and index != UNION
            probability = decision.route_scores[0, index].exp().item() if known else None
            tickets.append(Ticket(model.route_name(index), scores, threshold, probability))
    return Answers(tickets, *choose(model, tickets, decision))


def choose(model: RTLModel, tickets: list[Ticket], decision: Any) -> tuple[Ticket | None, str]:
    """The ticket whose answer counts, and how it was found, in HTML."""
    if decision is not None:
        chosen = tickets[decision.route_ids.item()]  # the union, -1, is the last one
        words = f"The router <code>{model.router.name}</code> "
        likeliest = model.route_name(decision.route_scores[0].argmax().item())
        sure = f"<b>{escape(likeliest)}</b>, with a probability of {decision.confidence.item():.1%}"
        if decision.confidence.item() < model.config.router_threshold:
            words += f"finds no route: the likeliest is {sure}, which is below {model.config.router_threshold:.1%}. "
            words += f"The ticket for such cases is <b>{escape(chosen.route)}</b>."
        else:
            words += f"finds the route {sure}."
    elif model.config.ticket_task == "membership":
        chosen = max(tickets, key=lambda ticket: ticket.score)
        words = f"No router was fitted. The ticket of <b>{escape(chosen.route)}</b> has the highest score."
    else:
        return None, (
            "This model has no router, so it cannot say whose answer counts: read the row of the route that your "
            "sample is of. <code>RTLTrainer.fit_router</code> fits a router."
        )
    return chosen, f"{words} Its ticket answers <b>{escape(chosen.answer)}</b> ({chosen.score:.3f})."


def show(classify: Pipeline, given: str | None) -> str:
    """What all tickets say of the file of an image, or of a text, in HTML. What cannot be answered is said there."""
    if not (given or "").strip():
        return "<p>Choose an example, or give an input of your own.</p>"
    try:
        if classify.task == "image-classification":
            sample, cut = read_image(given, num_channels=classifiers.count_channels(classify.model)), None
        else:
            sample = given.strip()
            cut = classifiers.words_on_cut("The text", sample, classify.tokenizer)
        answers = ask(classify, sample)
    except ValueError as error:
        return as_html(str(error))
    return f"{_STYLE}<p>{answers.words}</p>{as_html(cut) if cut else ''}{answers_table(answers)}"


def answers_table(answers: Answers) -> str:
    """A row per ticket: its answer, a bar of its score, the router's probability, and the scores of the top labels."""
    first = answers.tickets[0]
    membership, routed = first.threshold is not None, first.probability is not None
    labels = [] if membership else top_labels(answers.tickets)
    asked = "is it mine?" if membership else "answer"
    rows = [["ticket", asked, "score; the line is its threshold" if membership else "score"]]
    rows[0] += [*(["route's probability"] if routed else []), *map(escape, labels)]
    for ticket in answers.tickets:
        row = [escape(ticket.route), escape(ticket.answer), bar(ticket.score, ticket.threshold)]
        if routed:
            row.append("" if ticket.probability is None else bar(ticket.probability))
        rows.append([*row, *(f"{ticket.scores[label]:.3f}" for label in labels)])
    chosen = None if answers.chosen is None else answers.tickets.index(answers.chosen)
    return table(rows, chosen)


def top_labels(tickets: Sequence[Ticket]) -> list[str]:
    """The labels with the highest scores that any ticket gives them."""
    best = {label: max(ticket.scores[label] for ticket in tickets) for label in tickets[0].scores}
    return sorted(best, key=best.__getitem__, reverse=True)[:_SHOWN_LABELS]


def sizes_table(model: RTLModel) -> str:
    """What the tickets weigh together, beside a model per route."""
    sizes = model.footprint()
    largest = max(sizes[form] for form in _SHOWN_FORMS)
    rows = [["size", "bytes", "what"]]
    for form in _SHOWN_FORMS:
        drawn = bar(sizes[form] / largest, number=human_bytes(sizes[form]))
        rows.append([drawn, f"{sizes[form]:,}", as_code(FOOTPRINT_FORMS[form].format(model.num_routes))])
    return _STYLE + table(rows)


def table(rows: Sequence[Sequence[str]], chosen: int | None = None) -> str:
    """A table of HTML cells, titles first; `chosen` is the row that stands out, counted without the titles."""
    body = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in rows[0])}</tr>"]
    for number, row in enumerate(rows[1:]):
        mark = " class=chosen" if number == chosen else ""
        body.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return f"<div class=rtl><table>{''.join(body)}</table></div>"


def bar(share: float, tick: float | None = None, number: str | None = None) -> str:
    line = "" if tick is None else f'<b style="left: {tick:.1%}"></b>'
    return f'<span class=bar><i style="width: {share:.1%}"></i>{line}</span>{number or f"{share:.3f}"}'


def pictures(model: RTLModel) -> Iterator[tuple[str, str]]:
    """Titles and pictures of the masks, in HTML."""
    bank = model.mask_bank
    if model.num_routes > 1:
        similarity, chance = bank.similarity(), bank.chance_similarity()
        drawn = picture(lambda file: plots.similarity_heatmap(similarity, bank.route_names, file, chance=chance))
        yield "How much tickets share, pair by pair", f"{drawn}<p>{_SHARED}</p>"
    density = bank.density(per_layer=True)
    drawn = picture(lambda file: plots.layer_densities(density, bank.weight_names, bank.route_names, file))
    yield "What each ticket keeps, layer by layer", f"{drawn}<p>{_KEPT}</p>"


def picture(draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder, "picture.png"))
        data = base64.b64encode(Path(folder, "picture.png").read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" style="max-width: 100%; background: white">'


def introduction(name: str, model: RTLModel) -> str:
    bank, backbone = model.mask_bank, model.backbone.config
    # A loaded backbone's own `model_type` is that of the routed model, its class's is not.
    architecture = getattr(backbone, "architecture", type(backbone).model_type)
    asks = "each predicts one of the labels"
    if model.config.ticket_task == "membership":
        asks = "each answers 'is this sample of my route?'"
    return (
        f"<h1>{escape(name)}</h1><p>One network, {escape(architecture)}, holds "
        f"{model.num_routes} sparse subnetworks, the tickets: one for each route, a group of the data, and {asks}. "
        f"A ticket keeps {bank.density().mean():.1%} of {bank.num_weights:,} prunable weights, on average.</p>"
    )


def as_html(words: str) -> str:
    return f"<p>{as_code(words)}</p>"


def as_code(words: str) -> str:
    """HTML in which what stands between backticks is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(words, quote=False))


def build(name: str, examples: Path | None = None) -> Any:
    """
    The page of a model, `gradio.Blocks`. Where the model cannot be shown, the page says what it needs.

    Args:
        name (`str`): a folder or a repo id.
        examples (`Path`, *optional*): a folder of images, or of files of one text each.
    """
    import gradio

    with gradio.Blocks(title="Tickets of one network", analytics_enabled=False, fill_width=True) as page:
        try:
            classify = load(name)
            found = [] if examples is None else find_examples(classify.task, examples)
        except (OSError, ValueError) as error:
            gradio.HTML(f"<h1>{escape(name or 'This model')} cannot be shown</h1>{as_html(str(error))}")
            return page

        def answer(value: str | None) -> str:
            return show(classify, value)

        model: Any = classify.model
        gradio.HTML(introduction(name, model))
        first = found[0] if found else None
        answers = gradio.HTML(answer(first), render=False)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                if classify.task == "image-classification":
                    look = {"label": "Image", "height": 240, "elem_classes": "rtl-given"}
                    sources = ["upload", "clipboard"]
                    # The file as it came: `read_image` turns it upright, and to the channels of the model.
                    given = gradio.Image(first, type="filepath", image_mode=None, sources=sources, **look)
                else:
                    given = gradio.Textbox(first, label="Text", lines=4)
                asked = {"fn": answer, "inputs": given, "outputs": answers}
                gradio.Button("Ask the tickets", variant="primary").click(**asked)
                if found:
                    gradio.Examples([[example] for example in found], run_on_click=True, cache_examples=False, **asked)
            with gradio.Column(scale=3, min_width=320):
                answers.render()
        with gradio.Row():
            for title, drawn in pictures(model):
                with gradio.Column(min_width=400):
                    gradio.HTML(f"<h3>{title}</h3>{drawn}")
        gradio.HTML(f"<h3>What they weigh</h3>{sizes_table(model)}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("HF_RTL_MODEL", MODEL)
    parser.add_argument("model", nargs="?", default=default, help="folder or repo id; default: HF_RTL_MODEL")
    beside = Path(__file__).parent / "examples"
    parser.add_argument("--examples", type=Path, default=beside, help="folder of images, or of files of one text each")
    arguments = parser.parse_args()
    if arguments.examples != beside and not arguments.examples.is_dir():
        parser.error(f"--examples {arguments.examples} is no folder")
    if find_spec("gradio") is None:
        raise SystemExit('the page needs gradio: pip install "hf_rtl[app]"')
    build(arguments.model, arguments.examples).launch(share=False)


if __name__ == "__main__":
    main()
