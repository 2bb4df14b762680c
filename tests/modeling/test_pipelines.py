"""The stock pipelines that classify images, texts and sounds, with the ticket of a view or of a context."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from hf_rtl import RTLModelForAudioClassification, RTLModelForImageClassification, RTLModelForSequenceClassification


@pytest.fixture(params=["image-classification", "text-classification", "audio-classification"])
def asked(request, tiny_vit_config, tiny_bert_config, fill_masks):
    """A task, a model for it, the processor as an argument of `pipeline`, and two inputs."""
    if request.param == "image-classification":
        cls, config, inputs = RTLModelForImageClassification, tiny_vit_config, [Image.new("RGB", (8, 8), "red")] * 2
        processor = {"image_processor": ViTImageProcessor(size={"height": 8, "width": 8})}
    elif request.param == "text-classification":
        cls, config, inputs = RTLModelForSequenceClassification, tiny_bert_config, ["a", "b"]
        words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[PAD]": 3}, unk_token="[UNK]"))
        processor = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")}
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
        cls, inputs = RTLModelForAudioClassification, [np.linspace(-1, 1, 400, dtype=np.float32)] * 2
        processor = {"feature_extractor": Wav2Vec2FeatureExtractor()}
    model = cls.from_backbone(config, route_names=["east", "west"], ticket_task="labels", seed=0).eval()
    fill_masks(model)
    return request.param, model, processor, inputs


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
    routes = ["west", "east"]
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
