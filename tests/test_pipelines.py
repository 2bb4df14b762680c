"""Pipelines of transformers: stock ones with the ticket of a view or of a context, and those that take `route_ids`."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from hf_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForImageClassification,
    RTLModelForMaskedLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
    routed_pipeline,
)


TEXT_CLASSES = {
    "text-classification": RTLModelForSequenceClassification,
    "token-classification": RTLModelForTokenClassification,
    "fill-mask": RTLModelForMaskedLM,
}
CLASSIFICATION = ["image-classification", "text-classification", "audio-classification"]


def make(task, vit_config, bert_config, fill_masks, ticket_task="labels"):
    """A model, the processor as an argument of `pipeline`, and four inputs."""
    if task == "image-classification":
        cls, config = RTLModelForImageClassification, vit_config
        inputs = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green", "black")]
        processor = {"image_processor": ViTImageProcessor(size={"height": 8, "width": 8})}
    elif task in TEXT_CLASSES:
        cls, config, inputs = TEXT_CLASSES[task], bert_config, ["a b", "b", "a", "b a a"]
        if task == "fill-mask":
            inputs = [f"{text} [MASK]" for text in inputs]
        words = {"[UNK]": 0, "a": 1, "b": 2, "[PAD]": 3, "[MASK]": 4, **{f"w{i}": i for i in range(5, 40)}}
        words = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        words.pre_tokenizer = WhitespaceSplit()
        tokens = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
        processor = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, **tokens)}
    else:
        config = Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8,),
            conv_kernel=(10,),
            conv_stride=(5,),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            num_labels=3,
        )
        cls = RTLModelForAudioClassification
        inputs = [np.sin(np.linspace(-1, step, 400), dtype=np.float32) for step in range(1, 5)]
        processor = {"feature_extractor": Wav2Vec2FeatureExtractor()}
    model = cls.from_backbone(config, route_names=["east", "west", "north"], ticket_task=ticket_task, seed=0).eval()
    fill_masks(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, processor, inputs


@pytest.fixture(params=CLASSIFICATION)
def asked(request, tiny_vit_config, tiny_bert_config, fill_masks):
    """A task, and the model, the processor and the inputs of `make`."""
    return request.param, *make(request.param, tiny_vit_config, tiny_bert_config, fill_masks)


def test_a_view_or_a_context_names_the_route_for_stock_pipelines(asked):
    task, model, processor, inputs = asked
    ask = pipeline(task, model=model, **processor)
    views = {route: pipeline(task, model=model.with_route(route), **processor) for route in model.route_names}
    answers = {}
    for route, view in views.items():
        ticket = pipeline(task, model=model.extract_ticket(route), **processor)
        answers[route] = ticket(inputs, top_k=3)
        assert view(inputs, top_k=3) == answers[route]
        with model.route_context(route):
            assert ask(inputs, top_k=3) == answers[route]
    assert answers["east"] != answers["west"]
    routes = ["west", "east", "east", "north"]
    assert [views[route](one, top_k=3) for one, route in zip(inputs, routes, strict=True)] == [
        answers[route][index] for index, route in enumerate(routes)
    ]


def test_a_pipeline_without_a_route_says_how_to_name_one(asked):
    task, model, processor, inputs = asked
    ask = pipeline(task, model=model, **processor)
    corrected = r"need a view, `pipeline\(task, model=model.with_route\('east'\), …\)`"
    with pytest.raises(ValueError, match=corrected):
        ask(inputs)
    # The pipeline for images refuses arguments that it does not know; the others do not pass them on.
    error, message = (TypeError, "route_ids") if task == "image-classification" else (ValueError, corrected)
    with pytest.raises(error, match=message):
        ask(inputs[0], route_ids="west")


@pytest.mark.parametrize("task", [*CLASSIFICATION, "token-classification", "fill-mask"])
def test_a_routed_pipeline_answers_every_sample_through_its_route(
    task, tiny_vit_config, tiny_bert_config, fill_masks, tmp_path
):
    model, processor, inputs = make(task, tiny_vit_config, tiny_bert_config, fill_masks)
    ask = routed_pipeline(task, model, **processor)
    views = {route: pipeline(task, model=model.with_route(route), **processor) for route in (*model.route_names, -1)}
    options = {} if task == "token-classification" else {"top_k": 3}
    for route, view in views.items():
        answers = view(inputs, **options)
        assert ask(inputs, route_ids=route, **options) == answers
        assert ask(inputs[1], route_ids=route) == view(inputs[1])
    routes = ["north", "east", "north", -1]
    single = [views[route](one, **options) for one, route in zip(inputs, routes, strict=True)]
    assert ask(inputs, route_ids=routes, **options) == single
    assert ask(Samples(inputs), route_ids=torch.tensor([2, 0, 2, -1]), **options) == single
    batched = ask(inputs, route_ids=routes, batch_size=3, **options)
    assert flat(batched) == pytest.approx(flat(single), rel=1e-4) and len(flat(single)) >= 7
    with pytest.raises(ValueError, match="`route_ids` is missing"):
        ask(inputs)

    model.save_pretrained(tmp_path / "final", processing_class=next(iter(processor.values())))
    (tmp_path / "run.json").write_text("{}")
    for name in (str(tmp_path / "final"), tmp_path):  # a folder, and the directory of a run
        loaded = routed_pipeline(task, name)
        assert flat(loaded(inputs, route_ids=routes, **options)) == pytest.approx(flat(single), rel=1e-4)
        assert isinstance(loaded, type(views[-1])) and isinstance(loaded.model, RTLModel)


class Samples(Dataset):
    """A data set of samples."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def flat(answers):
    """All scores, in their order."""
    if isinstance(answers, dict):
        return [answers["score"]]
    return [score for answer in answers for score in flat(answer)]


def test_a_routed_pipeline_of_membership_tickets_names_the_route_or_scores_them_all(
    tiny_vit_config, tiny_bert_config, fill_masks
):
    task = "image-classification"
    model, processor, inputs = make(task, tiny_vit_config, tiny_bert_config, fill_masks, ticket_task="membership")
    ask, plain = routed_pipeline(task, model, **processor), pipeline(task, model=model, **processor)
    assert ask(inputs) == plain(inputs) and len(plain(inputs[0])) == 3
    answers = ask(inputs, route_ids=["west", "east", "west", "north"])
    assert [[answer["label"] for answer in one] for one in answers] == [["west"], ["east"], ["west"], ["north"]]
    assert answers[2] == pipeline(task, model=model.with_route("west"), **processor)(inputs[2])


def test_a_routed_pipeline_refuses_in_words_before_any_work(asked, monkeypatch):
    task, model, processor, inputs = asked
    ask = routed_pipeline(task, model, **processor)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match="`route_ids` has 2 entries for 4 samples; give one per sample"):
        ask(inputs, route_ids=["west", "east"])
    with pytest.raises(ValueError, match=r"= \['west'\] has a route per sample, but the input is no list of them"):
        ask(inputs[0], route_ids=["west"])
    for unknown in ("south", ["west", "east", "south", "east"]):
        with pytest.raises(ValueError, match="'south'.*'east', 'west', 'north'"):
            ask(inputs, route_ids=unknown)
    with pytest.raises(TypeError, match=f"is no routed model but a {type(model.extract_ticket(0)).__name__}, which"):
        routed_pipeline(task, model.extract_ticket(0), **processor)
