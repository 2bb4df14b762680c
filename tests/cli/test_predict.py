"""`hf-rtl predict`: files of all kinds against calls of the model, how routes are found, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rtl import (
    RTLModel,
    RTLModelForCausalLM,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSeq2SeqLM,
    image_processor_from_timm,
)
from hf_rtl.modeling.routers import CentroidRouter, ScoreRouter
from hf_rtl_cli.main import main
from hf_rtl_cli.samples import read_audio
from hf_rtl_cli.tables import fraction
from tests.modeling.random_routers import randomised
from tests.test_pipelines import CLASSIFICATION, make


ROUTES = ["east", "west", "north"]
RATE = 16_000
WORDS = ["a", "b", "b", "a"]  # of a text


@pytest.fixture
def saved(tmp_path, tiny_vit_config, tiny_bert_config, fill_masks):
    """`saved(task, change=…, **options)` is a folder with a model and its processor, the model, and the processor."""

    def saved(task, change=lambda model: None, **options):
        model, processor, _ = make(task, tiny_vit_config, tiny_bert_config, fill_masks, **options)
        (processor,) = processor.values()
        change(model)
        model.save_pretrained(tmp_path / "model", processing_class=processor)
        return tmp_path / "model", model, processor

    return saved


@pytest.fixture
def files(tmp_path):
    """`files(task)` writes two files for a model of the task."""

    def files(task):
        if task == "image-classification":
            names = ["red.png", "shades.jpg"]
            Image.new("RGB", (9, 12), "red").save(tmp_path / "red.png")
            Image.linear_gradient("L").convert("RGB").save(tmp_path / "shades.jpg", exif=_turned())
        elif task == "audio-classification":
            names = ["low.wav", "high.wav"]
            for name, pitch in zip(names, (200, 900), strict=True):
                write_sine(tmp_path / name, pitch)
        else:
            names = ["one.txt", "two.txt"]
            (tmp_path / "one.txt").write_text(f"{' '.join(WORDS)}\n")
            (tmp_path / "two.txt").write_bytes(b"\xef\xbb\xbfb a b b")  # with the mark that editors of Windows write
        return [str(tmp_path / name) for name in names]

    return files


def _turned():
    """The note of a camera that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def write_sine(path, *pitches, rate=RATE, num_samples=800):
    """A sine of each pitch, a channel each."""
    times = np.arange(num_samples) / rate
    channels = np.stack([0.5 * np.sin(2 * np.pi * pitch * times) for pitch in pitches], axis=1)
    with wave.open(str(path), "wb") as file:
        file.setparams((len(pitches), 2, rate, num_samples, "NONE", None))
        file.writeframes((channels * 32767).astype("<i2").tobytes())


def inputs_of(file, processor):
    """What the model takes, made here from the file."""
    if file.endswith(".wav"):
        with wave.open(file) as source:
            samples = np.frombuffer(source.readframes(source.getnframes()), "<i2").astype(np.float32) / 32768
        return processor(samples, sampling_rate=RATE, return_tensors="pt")
    if file.endswith(".txt"):
        return processor(Path(file).read_text("utf-8-sig").strip(), return_tensors="pt")
    image = Image.open(file)
    image = image.transpose(Image.Transpose.ROTATE_270) if file.endswith(".jpg") else image
    return processor(image.convert("RGB"), return_tensors="pt")


@torch.no_grad()
def logits(model, file, processor, route):
    return model(**inputs_of(file, processor), route_ids=route).logits[0]


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(folder, file)` returns the lines on a terminal of 160 columns, or with `--json` the values."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        assert main(["predict", *map(str, arguments)]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed.splitlines()

    return call


@pytest.fixture
def fails(capsys, monkeypatch):
    """`fails(folder, file)` returns the error, one line, and checks that no model was loaded."""

    def fails(*arguments):
        monkeypatch.setattr("hf_rtl_cli.predict.load_model", None)
        assert main(["predict", *map(str, arguments)]) == 1
        printed = capsys.readouterr()
        start, _, message = printed.err.partition("hf-rtl predict: error: ")
        assert printed.out == start == "" and message.count("\n") == 1
        return message[:-1]

    return fails


def shown(values, *names):
    """The lines of a table that has these values."""
    texts = {"score": fraction, "confidence": fraction}
    return [[texts.get(name, str)(value[name]) for name in names] for value in values]


# Routes


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_named_route_labels_every_file_as_the_model_does(task, saved, files, call):
    folder, model, processor = saved(task)
    names = files(task)
    values = call(folder, *names, "--route", "west", "--json")
    assert [value["file"] for value in values] == names
    for file, value in zip(names, values, strict=True):
        shares = logits(model, file, processor, "west").softmax(-1)
        assert value == {
            "file": file,
            "route": "west",
            "inferred_by": None,
            "confidence": None,
            "answer": model.config.id2label[shares.argmax().item()],
            "score": pytest.approx(shares.max().item(), rel=1e-5),
        }
    header, _, *lines = call(folder, *names, "--route", "west")
    assert header.split() == ["file", "route", "answer", "score"]
    assert [line.split() for line in lines] == shown(values, "file", "route", "answer", "score")


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_router_infers_the_route_of_each_file(task, saved, files, call):
    num_features = 256 if task == "audio-classification" else 16
    router = randomised(CentroidRouter(3, num_features))
    folder, model, processor = saved(task, lambda model: model.set_router(router))
    names = files(task)
    values = call(folder, *names, "--json")
    for file, value in zip(names, values, strict=True):
        decision = model.infer_routes(**inputs_of(file, processor))
        route = ROUTES[decision.route_ids.item()]
        score = logits(model, file, processor, route).softmax(-1).max().item()
        assert (value["route"], value["inferred_by"]) == (route, "centroid")
        assert value["confidence"] == pytest.approx(decision.confidence.item(), rel=1e-5)
        assert value["score"] == pytest.approx(score, rel=1e-5)
    header, _, *lines = call(folder, *names)
    assert header.split() == ["file", "route", "answer", "score", "confidence"]
    assert [line.split() for line in lines[:2]] == shown(values, "file", "route", "answer", "score", "confidence")
    assert lines[2] == "" and lines[3].startswith("Each route was inferred by the router 'centroid'")
    assert {value["route"] for value in call(folder, *names, "--route", "north", "--json")} == {"north"}


def test_an_unsure_router_takes_the_fallback(saved, files, call):
    folder, model, processor = saved(
        "image-classification", lambda model: model.set_router(ScoreRouter(3), threshold=1)
    )
    (file, _) = files("image-classification")
    (value,) = call(folder, file, "--json")
    assert value["route"] == "union" and value["confidence"] < 1
    assert value["score"] == pytest.approx(logits(model, file, processor, -1).softmax(-1).max().item(), rel=1e-5)


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_of_membership_tickets_the_one_with_the_highest_score_answers(task, saved, files, call):
    folder, model, processor = saved(task, ticket_task="membership")
    names = files(task)
    values = call(folder, *names, "--json")
    for file, value in zip(names, values, strict=True):
        scores = torch.stack([logits(model, file, processor, route)[0] for route in ROUTES]).sigmoid()
        assert value == {
            "file": file,
            "route": ROUTES[scores.argmax()],
            "inferred_by": "highest score",
            "confidence": None,
            "answer": "yes" if scores.max() > 0.5 else "no",
            "score": pytest.approx(scores.max().item(), rel=1e-5),
        }
    _, _, *lines = call(folder, *names)
    assert [line.split() for line in lines[:2]] == shown(values, "file", "route", "answer", "score")
    assert lines[2:] == ["", "Each route is that of the ticket with the highest score."]


def test_a_membership_ticket_says_yes_above_its_threshold(saved, files, call):
    task = "image-classification"
    names = files(task)
    _, model, processor = saved(task, ticket_task="membership")
    low, high = sorted(logits(model, file, processor, "west").item() for file in names)

    def calibrate(model):
        model.config.thresholds = [0.0, (low + high) / 2, 0.0]

    folder, _, _ = saved(task, calibrate, ticket_task="membership")
    values = call(folder, *names, "--route", "west", "--json")
    assert sorted(value["answer"] for value in values) == ["no", "yes"]
    for file, value in zip(names, values, strict=True):
        score = logits(model, file, processor, "west").sigmoid().item()
        assert value["score"] == pytest.approx(score, rel=1e-5) and value["route"] == "west"
        assert (value["answer"] == "yes") == (value["score"] > 1 / (1 + math.exp(-(low + high) / 2)))


def test_the_router_of_membership_tickets_goes_before_the_highest_score(saved, files, call):
    router = ScoreRouter(3)
    router.offset.copy_(torch.tensor([0.0, 0.0, 50.0]))
    task = "image-classification"
    folder, model, processor = saved(task, lambda model: model.set_router(router), ticket_task="membership")
    (file, _) = files(task)
    (value,) = call(folder, file, "--json")
    assert (value["route"], value["inferred_by"]) == ("north", "score") and value["confidence"] > 0.99
    assert value["score"] == pytest.approx(logits(model, file, processor, "north").sigmoid().item(), rel=1e-5)


# Kinds of files


def test_every_entity_of_a_text_has_a_line(saved, files, call, tmp_path):
    folder, model, processor = saved("token-classification")
    (file, _) = files("token-classification")
    values = call(folder, file, "--route", "east", "--json")
    shares = logits(model, file, processor, "east").softmax(-1)
    scores, labels = shares.max(dim=-1)
    # Neighbours with the same label are one entity, whose score is their mean.
    starts = [index for index in range(len(labels)) if index == 0 or labels[index] != labels[index - 1]]
    spans = list(zip(starts, [*starts[1:], len(labels)], strict=True))
    assert [(value["word"], value["answer"]) for value in values] == [
        (" ".join(WORDS[first:last]), model.config.id2label[labels[first].item()]) for first, last in spans
    ]
    means = [scores[first:last].mean().item() for first, last in spans]
    assert [value["score"] for value in values] == pytest.approx(means, rel=1e-5)
    header, _, *lines = call(folder, file, "--route", "east")
    assert header.split() == ["file", "route", "word", "answer", "score"] and len(lines) == len(values)

    def none_named(model):
        model.config.id2label = dict.fromkeys(range(3), "O")

    folder, _, _ = saved("token-classification", none_named)
    (value,) = call(folder, file, "--route", "east", "--json")
    assert (value["word"], value["answer"], value["score"]) == (None, None, None)
    assert call(folder, file, "--route", "east")[2].split() == [file, "east", "-", "-", "-"]


def test_images_of_one_channel_stay_grey(tmp_path, fill_masks, call):
    model = RTLModelForImageClassification.from_backbone(
        "test_resnet", route_names=ROUTES, ticket_task="labels", num_labels=3, in_chans=1, seed=0
    ).eval()
    fill_masks(model)
    data = {"input_size": (1, 32, 32), "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,)}
    processor = image_processor_from_timm({**data, "crop_pct": 1.0, "crop_mode": "center"})
    model.save_pretrained(tmp_path / "model", processing_class=processor)
    image = Image.linear_gradient("L").resize((32, 32))
    image.save(tmp_path / "grey.png")
    image.convert("RGB").save(tmp_path / "coloured.png")
    values = call(tmp_path / "model", *tmp_path.glob("*.png"), "--route", "east", "--json")
    pixels = torch.tensor(np.asarray(image)[np.newaxis, np.newaxis] / 255.0, dtype=torch.float32) * 2 - 1
    with torch.no_grad():
        score = model(pixels, route_ids="east").logits.softmax(-1).max().item()
    assert [value["score"] for value in values] == pytest.approx([score, score], rel=1e-4)


def test_audio_is_mixed_and_resampled_to_the_rate_of_the_model(saved, call, tmp_path):
    folder, model, processor = saved("audio-classification")
    file = str(tmp_path / "stereo.wav")
    write_sine(file, 200, 900, rate=48_000, num_samples=12_000)
    times = np.arange(4000) / RATE
    expected = 0.25 * (np.sin(2 * np.pi * 200 * times) + np.sin(2 * np.pi * 900 * times))
    samples = read_audio(file, RATE)
    # A filter does not know what comes before the first sample and after the last.
    assert samples.dtype == np.float32 and samples[50:-50] == pytest.approx(expected[50:-50], abs=1e-2)
    (value,) = call(folder, file, "--route", "east", "--json")
    inputs = processor(samples, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        shares = model(**inputs, route_ids="east").logits.softmax(-1)
    assert value["score"] == pytest.approx(shares.max().item(), rel=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_text_is_cut_to_what_the_model_can_read_and_this_is_said(task, saved, tmp_path, capsys):
    folder, _, _ = saved(task)
    (tmp_path / "long.txt").write_text("a b " * 10)
    (tmp_path / "cut.txt").write_text("a b " * 6)
    answers = []
    for name, said in (("long.txt", "has 20 tokens, of which the model reads 12."), ("cut.txt", "")):
        assert main(["predict", str(folder), str(tmp_path / name), "--route", "east", "--json"]) == 0
        printed = capsys.readouterr()
        assert said in printed.err and (said or not printed.err)
        answers.append([value["score"] for value in json.loads(printed.out)])
    assert answers[0] == answers[1]


# What is refused


def test_a_model_without_a_router_needs_a_route(saved, files, fails):
    folder, _, _ = saved("text-classification")
    (file, other) = files("text-classification")
    message = fails(folder, file, other)
    assert "has no router, so --route must be one of 'east', 'west', 'north'" in message
    assert message.endswith(f"`hf-rtl predict {folder} {file} --route east`.")
    assert fails(folder, file, "--route", "nroth") == (
        "unknown route 'nroth'; the routes are 'east', 'west', 'north'. Did you mean 'north'?"
    )


def test_files_must_be_there_and_of_the_kind_of_the_model(saved, files, fails, tmp_path):
    wrong, empty = tmp_path / "wrong.bin", tmp_path / "empty.txt"
    wrong.write_bytes(bytes(range(128, 256)))
    empty.write_text(" \n")
    for task, said in (
        ("image-classification", "is no image that can be read"),
        ("audio-classification", "is no audio that can be read"),
        ("text-classification", "is no text in UTF-8"),
    ):
        folder, _, _ = saved(task)
        good, _ = files(task)
        assert fails(folder, good, wrong, "--route", "east").startswith(f"{str(wrong)!r} {said}: ")
        assert f"there is no file '{tmp_path}/none'" in fails(folder, good, tmp_path / "none", "--route", "east")
        assert "is a folder: give the files in it" in fails(folder, tmp_path, "--route", "east")
        shutil.rmtree(folder)
    folder, _, _ = saved("text-classification")
    assert fails(folder, empty, "--route", "east") == f"{str(empty)!r} holds no text."
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "shades.jpg").read_bytes()[:-100])
    shutil.rmtree(folder)
    folder, _, _ = saved("image-classification")
    assert "is no image that can be read" in fails(folder, cut, "--route", "east")
    shutil.rmtree(folder)
    folder, _, _ = saved("audio-classification")
    write_sine(tmp_path / "silent.wav", 200, num_samples=0)
    assert fails(folder, tmp_path / "silent.wav", "--route", "east").endswith("silent.wav' holds no sound.")


def test_audio_needs_soundfile(saved, files, fails, monkeypatch):
    folder, _, _ = saved("audio-classification")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "soundfile" else find_spec(name))
    message = fails(folder, *files("audio-classification"), "--route", "east")
    assert message == "audio needs soundfile: pip install hf_rtl[speech]"


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_model_needs_its_processor(task, saved, files, fails):
    folder, _, processor = saved(task)
    for pattern in ("preprocessor_config.json", "token*"):
        for file in folder.glob(pattern):
            file.unlink()
    message = fails(folder, *files(task), "--route", "east")
    kind, made = {
        "image-classification": ("image processor", "AutoImageProcessor"),
        "audio-classification": ("feature extractor", "AutoFeatureExtractor"),
        "text-classification": ("tokenizer", "AutoTokenizer"),
    }[task]
    assert f"'{folder}' has no {kind}, which makes the model's inputs" in message
    assert f"`{made}.from_pretrained('org/backbone').save_pretrained('{folder}')`" in message


def test_a_timm_backbone_has_a_processor_of_its_own(tiny_labels_model, files, fails, tmp_path):
    tiny_labels_model.save_pretrained(tmp_path / "model")
    message = fails(tmp_path / "model", *files("image-classification"), "--route", "day")
    assert "image_processor_from_timm(timm.data.resolve_model_data_config(model.backbone.timm_model)).save" in message


@pytest.mark.parametrize(
    ("model_class", "config", "instead"),
    [
        (
            RTLModelForCausalLM,
            "tiny_gpt2_config",
            "hf_rtl.routed_pipeline('text-generation', '{}')(text, route_ids='east')",
        ),
        (
            RTLModelForSeq2SeqLM,
            "tiny_t5_config",
            "hf_rtl.RTLModel.from_pretrained('{}').generate(input_ids, route_ids='east')",
        ),
        (RTLModelForMaskedLM, "tiny_bert_config", "hf_rtl.routed_pipeline('fill-mask', '{}')(text, route_ids='east')"),
        (RTLModel, "tiny_bert_config", "hf_rtl.RTLModel.from_pretrained('{}')(…, route_ids='east')"),
    ],
)
def test_other_models_are_named_with_what_to_call(model_class, config, instead, request, files, fails, tmp_path):
    config = request.getfixturevalue(config)
    model_class.from_backbone(config, route_names=ROUTES, ticket_task="labels", seed=0).save_pretrained(tmp_path / "m")
    message = fails(tmp_path / "m", *files("text-classification"), "--route", "east")
    assert f"is {model_class.__name__}, and predict is for image-classification, audio-" in message
    assert message.endswith(f"in Python use `{instead.format(tmp_path / 'm')}`.")


def test_a_file_that_the_model_cannot_take_is_named(saved, tmp_path, capsys):
    folder, _, _ = saved("audio-classification")
    write_sine(tmp_path / "short.wav", 200, num_samples=3)
    assert main(["predict", str(folder), str(tmp_path / "short.wav"), "--route", "east"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        "hf-rtl predict: error: RTLModelForAudioClassification cannot answer '.*short.wav': .*\n", error
    )
