"""The page of a model in a browser: its scores against single calls of the model, its words, and its parts."""

from __future__ import annotations

import base64
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_rtl import RTLModelForCausalLM, RTLModelForImageClassification, image_processor_from_timm
from hf_rtl.modeling.routers import CentroidRouter, ScoreRouter
from space import app, screenshot
from tests.modeling.random_routers import randomised
from tests.recipes.commands import RECIPES
from tests.test_pipelines import make


SPACE = RECIPES / "space"
ROUTES = ["east", "west", "north"]
SHOWN = ["image-classification", "text-classification"]


@pytest.fixture
def saved(tmp_path, tiny_vit_config, tiny_bert_config, fill_masks):
    """`saved(task, change=…, **options)` is the name of a folder with a model and its processor."""

    def saved(task, change=lambda model: None, **options):
        model, processor, _ = make(task, tiny_vit_config, tiny_bert_config, fill_masks, **options)
        change(model)
        model.save_pretrained(tmp_path / "model", processing_class=next(iter(processor.values())))
        return str(tmp_path / "model")

    return saved


@pytest.fixture
def given(tmp_path):
    """`given(task)` is what somebody gives to the page: the file of an image, or a text."""

    def given(task):
        if task == "text-classification":
            return "a b b"
        Image.linear_gradient("L").convert("RGB").save(tmp_path / "grey.png")
        return str(tmp_path / "grey.png")

    return given


def sample_of(task, given):
    return given if task == "text-classification" else Image.open(given)


@torch.no_grad()
def logits(classify, sample, route):
    """Those of a call of the model, with inputs that its processor makes here."""
    if classify.task == "text-classification":
        inputs = classify.tokenizer(sample, return_tensors="pt")
    else:
        inputs = classify.image_processor(sample, return_tensors="pt")
    return classify.model(**inputs, route_ids=route).logits[0]


def cells(html):
    """The texts of a table's cells, row by row."""
    rows = re.findall("<tr.*?</tr>", html, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


@pytest.mark.parametrize("task", SHOWN)
def test_labels_of_every_ticket_have_the_scores_of_single_calls(task, saved, given):
    classify = app.load(saved(task))
    sample = sample_of(task, given(task))
    answers = app.ask(classify, sample)
    assert [ticket.route for ticket in answers.tickets] == ROUTES
    for ticket in answers.tickets:
        shares = logits(classify, sample, ticket.route).softmax(-1)
        names = classify.model.config.id2label
        assert ticket.scores == pytest.approx({names[i]: share for i, share in enumerate(shares.tolist())}, rel=1e-5)
        assert ticket.answer == names[shares.argmax().item()] and ticket.score == max(ticket.scores.values())
        assert ticket.threshold is None and ticket.probability is None
    assert answers.chosen is None and "has no router" in answers.words


@pytest.mark.parametrize("task", SHOWN)
def test_membership_tickets_say_yes_above_their_threshold_and_the_highest_score_counts(task, saved, given):
    plain = app.load(saved(task, ticket_task="membership"))
    sample = sample_of(task, given(task))
    own = [logits(plain, sample, route).item() for route in ROUTES]

    def calibrate(model):
        model.config.thresholds = [own[0] - 0.1, own[1] + 0.1, 0.0]

    answers = app.ask(app.load(saved(task, calibrate, ticket_task="membership")), sample)
    scores = torch.tensor(own).sigmoid().tolist()
    assert [ticket.score for ticket in answers.tickets] == pytest.approx(scores, rel=1e-5)
    thresholds = torch.tensor([own[0] - 0.1, own[1] + 0.1, 0.0]).sigmoid().tolist()
    assert [ticket.threshold for ticket in answers.tickets] == pytest.approx(thresholds, rel=1e-5)
    assert [ticket.answer for ticket in answers.tickets] == ["yes", "no", "yes" if own[2] > 0 else "no"]
    assert answers.chosen is answers.tickets[scores.index(max(scores))]
    assert "the highest score" in answers.words


@pytest.mark.parametrize("task", SHOWN)
def test_the_router_says_whose_answer_counts(task, saved, given):
    classify = app.load(saved(task, lambda model: model.set_router(randomised(CentroidRouter(3, 16)))))
    sample = sample_of(task, given(task))
    answers = app.ask(classify, sample)
    processor = classify.tokenizer if task == "text-classification" else classify.image_processor
    decision = classify.model.infer_routes(**processor(sample, return_tensors="pt"))
    shares = decision.route_scores[0].exp().tolist()
    assert [ticket.probability for ticket in answers.tickets] == pytest.approx(shares, rel=1e-5)
    assert sum(shares) == pytest.approx(1) and answers.chosen is answers.tickets[decision.route_ids.item()]
    assert f"finds the route <b>{answers.chosen.route}</b>, with a probability of {max(shares):.1%}" in answers.words


@pytest.mark.parametrize("fallback, row", [(-1, 3), ("north", 2)])
def test_an_unsure_router_falls_back(fallback, row, saved, given):
    def change(model):
        model.set_router(ScoreRouter(3), threshold=1, fallback=fallback)

    classify = app.load(saved("image-classification", change))
    sample = sample_of("image-classification", given("image-classification"))
    answers = app.ask(classify, sample)
    assert answers.chosen is answers.tickets[row] is answers.tickets[-1]
    shares = logits(classify, sample, fallback).softmax(-1)
    assert answers.chosen.score == pytest.approx(shares.max().item(), rel=1e-5)
    name = {-1: "union"}.get(fallback, fallback)
    assert "below 100.0%" in answers.words and f"for such cases is <b>{name}</b>" in answers.words


def test_images_of_one_channel_stay_grey(tmp_path, fill_masks):
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=ROUTES, ticket_task="labels", num_labels=3, in_chans=1, seed=0
    ).eval()
    fill_masks(model)
    data = {"input_size": (1, 32, 32), "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,)}
    processor = image_processor_from_timm({**data, "crop_pct": 1.0, "crop_mode": "center"})
    model.save_pretrained(tmp_path / "model", processing_class=processor)
    image = Image.linear_gradient("L").resize((32, 32))
    image.convert("RGB").save(tmp_path / "coloured.png")
    pixels = torch.tensor(np.asarray(image)[np.newaxis, np.newaxis] / 255.0, dtype=torch.float32) * 2 - 1
    with torch.no_grad():
        scores = [model(pixels, route_ids=route).logits.softmax(-1).max().item() for route in ROUTES]
    _, *rows = cells(app.show(app.load(str(tmp_path / "model")), str(tmp_path / "coloured.png")))
    assert [row[2] for row in rows] == [f"{score:.3f}" for score in scores]


def test_a_table_has_a_row_per_ticket_and_columns_for_the_likeliest_labels():
    tickets = [
        app.Ticket("<day>", {f"label {n}": 0.9 - n / 10 for n in range(8)}, None, 0.25),
        app.Ticket("night", {f"label {7 - n}": 0.85 - n / 10 for n in range(8)}, None, 0.75),
    ]
    html = app.answers_table(app.Answers(tickets, tickets[1], ""))
    header, day, night = cells(html)
    assert header[:4] == ["ticket", "answer", "score", "route's probability"]
    assert header[4:] == [*(f"label {n}" for n in (0, 7, 1, 6, 2, 5))]
    assert day[:4] == ["&lt;day&gt;", "label 0", "0.900", "0.250"]
    assert day[4:] == [*["0.900", "0.200", "0.800", "0.300", "0.700", "0.400"]]
    assert night[:4] == ["night", "label 7", "0.850", "0.750"]
    assert re.findall("<tr class=chosen><td>(.*?)<", html) == ["night"]
    assert 'style="width: 90.0%"' in html and 'style="width: 75.0%"' in html


def test_a_table_of_membership_tickets_has_no_labels_but_thresholds():
    tickets = [app.Ticket("a", {"a": 0.9}, 0.95, None), app.Ticket("b", {"b": 0.6}, 0.5, None)]
    html = app.answers_table(app.Answers(tickets, tickets[0], ""))
    assert [row[:2] for row in cells(html)] == [["ticket", "is it mine?"], ["a", "no"], ["b", "yes"]]
    assert html.count("left: 95.0%") == 1 and html.count("left: 50.0%") == 1


def test_what_cannot_be_answered_is_said(saved, tmp_path):
    classify = app.load(saved("text-classification"))
    for nothing in (None, "", " \n"):
        assert "Choose an example" in app.show(classify, nothing)
    assert "The text has 20 tokens, of which the model reads 12." in app.show(classify, "a b " * 10)
    assert "tokens" not in app.show(classify, "a b " * 6) and "<table>" in app.show(classify, "a b " * 6)
    classify = app.load(saved("image-classification"))
    (tmp_path / "none.png").write_text("no image")
    assert "is no image that can be read" in app.show(classify, str(tmp_path / "none.png"))


def test_an_input_that_the_model_cannot_take_is_a_sentence(saved, given, monkeypatch):
    classify = app.load(saved("image-classification"))
    monkeypatch.setattr(classify.image_processor, "size", {"height": 9, "width": 9})
    said = app.show(classify, given("image-classification"))
    assert re.fullmatch("<p>RTLModelForImageClassification cannot answer this input: .*</p>", said)


# Models that the page cannot show


@pytest.mark.parametrize("task", ["audio-classification", "token-classification"])
def test_other_files_are_answered_by_the_command(task, saved):
    folder = saved(task)
    with pytest.raises(ValueError, match="this page is for image-c.*, text-classification; `hf-rtl predict"):
        app.load(folder)


def test_language_models_are_named_with_what_to_call(tiny_gpt2_config, tmp_path):
    model = RTLModelForCausalLM.from_backbone(tiny_gpt2_config, route_names=ROUTES, ticket_task="labels", seed=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in Python use `hf_rtl.routed_pipeline\('text-generation'"):
        app.load(str(tmp_path))


def test_a_missing_model_or_processor_is_said(tiny_labels_model, tmp_path):
    with pytest.raises(ValueError, match="no model is named"):
        app.load("")
    with pytest.raises(ValueError, match="there is no folder"):
        app.load(str(tmp_path / "none"))
    tiny_labels_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image processor"):
        app.load(str(tmp_path))


# What does not depend on the input


def test_sizes_are_those_of_the_model(tiny_labels_model):
    footprint = tiny_labels_model.footprint()
    _, *rows = cells(app.sizes_table(tiny_labels_model))
    forms = ("compact_bytes", "full_bytes", "independent_compact_bytes", "independent_full_bytes")
    assert [row[1] for row in rows] == [f"{footprint[form]:,}" for form in forms]
    assert rows[3][2] == "3 independent models: plain networks, one per route"


@pytest.mark.slow
def test_masks_have_two_pictures_and_a_single_one_has_no_similarity(tiny_labels_model):
    drawn = dict(app.pictures(tiny_labels_model))
    assert list(drawn) == ["How much tickets share, pair by pair", "What each ticket keeps, layer by layer"]
    for html in drawn.values():
        assert base64.b64decode(re.search('base64,(.*?)"', html)[1]).startswith(b"\x89PNG")
    single = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=["all"], ticket_task="labels", num_labels=2, seed=0
    )
    assert list(dict(app.pictures(single))) == ["What each ticket keeps, layer by layer"]


def test_an_introduction_counts_tickets_and_weights(tiny_membership_model):
    bank = tiny_membership_model.mask_bank
    words = app.introduction("me/<b>", tiny_membership_model)
    kept = sum(int(mask.sum()) for route in range(3) for mask in bank[route]) / 3 / bank.num_weights
    assert "<h1>me/&lt;b&gt;</h1>" in words and "test_resnet, holds 3 sparse subnetworks" in words
    assert f"{kept:.1%} of {bank.num_weights:,} prunable weights" in words and "is this sample of my route?" in words


def test_examples_are_files_of_images_or_texts_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "c.npy"):
        (tmp_path / name).touch()
    for name in ("two", "one"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n")
    assert app.find_examples("image-classification", tmp_path) == [str(tmp_path / "a.JPG"), str(tmp_path / "b.png")]
    assert app.find_examples("text-classification", tmp_path) == ["one text", "two text"]


# The page


@pytest.mark.slow
@pytest.mark.parametrize("task", SHOWN)
def test_the_page_is_built_and_answers(task, saved, given, tmp_path):
    pytest.importorskip("gradio", reason="gradio is in the extra `app`, and not in `dev`: it takes 120 MB")
    folder = saved(task)
    value = given(task)
    (tmp_path / "one.txt").write_text(value)
    page = app.build(folder, tmp_path)
    kinds = [component["type"] for component in page.config["components"]]
    assert kinds.count("dataset") == kinds.count("button") == 1
    assert kinds.count("image" if task == "image-classification" else "textbox") == 1
    answer = page.fns[0].fn
    assert answer(value) == app.show(app.load(folder), value)
    assert page.analytics_enabled is False


@pytest.mark.slow
def test_the_page_of_a_model_that_it_cannot_show_says_why(tmp_path):
    pytest.importorskip("gradio", reason="gradio is in the extra `app`, and not in `dev`: it takes 120 MB")
    page = app.build(str(tmp_path / "<none>"))
    (said,) = [component["props"]["value"] for component in page.config["components"] if component["type"] == "html"]
    assert "&lt;none&gt; cannot be shown</h1>" in said and "there is no folder" in said


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match=r'pip install "hf_rtl\[app\]"'):
        app.main()


def test_a_folder_of_examples_must_exist(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["app.py", "model", "--examples", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        app.main()
    assert "none is no folder" in capsys.readouterr().err


def test_without_a_browser_the_command_for_pictures_names_it(monkeypatch):
    monkeypatch.setattr(screenshot.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["screenshot.py", "model", "page.png"])
    with pytest.raises(SystemExit, match="apt-get install chromium"):
        screenshot.main()


def test_the_folder_is_a_space():
    _, head, _ = (SPACE / "README.md").read_text().split("---\n", maxsplit=2)
    metadata = yaml.safe_load(head)
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).exists()
    assert len(metadata["short_description"]) <= 60  # the Hub refuses longer ones
    assert (SPACE / "requirements.txt").read_text().splitlines()[-1] == "hf_rtl[app]"
