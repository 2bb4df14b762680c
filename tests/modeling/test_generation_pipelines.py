"""The stock pipeline for text generation with tickets; neither it nor loading may warn."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline, set_seed

from hf_rtl import RTLModel, RTLModelForCausalLM, routed_pipeline
from hf_rtl.model_card import write_card
from hf_rtl.modeling.routers import CentroidRouter
from tests.model_card.cards import python_blocks, read_page


TASK = "text-generation"
TEXTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "batch_size": 4}


@pytest.fixture
def model(tiny_gpt2_config, fill_masks):
    tiny_gpt2_config.tie_word_embeddings, tiny_gpt2_config.pad_token_id = False, 0
    model = RTLModelForCausalLM.from_backbone(
        tiny_gpt2_config, route_names=["x", "y", "z"], ticket_task="labels", seed=0
    )
    fill_masks(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[END]", "[UNK]", *(f"w{number}" for number in range(37))]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "[PAD]", "eos_token": "[END]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


@pytest.fixture
def said(caplog):
    """The warnings of transformers."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(before)


@pytest.fixture
def answers(model, tokenizer, said):
    """Route -> the answers of a pipeline on its ticket, a plain model. Its warnings do not count as ours."""
    names = dict(enumerate(model.route_names)) | {-1: "union"}
    tickets = {route: pipeline(TASK, model=model.extract_ticket(route).eval(), tokenizer=tokenizer) for route in names}
    answers = {route: ticket(TEXTS, **OPTIONS) for route, ticket in tickets.items()}
    assert len(set(map(str, answers.values()))) == 4
    said.of_plain_models = {record.getMessage() for record in said.records}
    said.clear()
    return answers


def new_warnings(said):
    return {record.getMessage() for record in said.records} - said.of_plain_models


def test_a_view_answers_through_its_ticket(model, tokenizer, answers, said):
    for route, name in enumerate(model.route_names):
        ask = pipeline(TASK, model=model.with_route(name), tokenizer=tokenizer)
        assert ask(TEXTS, **OPTIONS) == answers[route] and "'output_modalities': ('text',)" in repr(ask)
    assert not new_warnings(said)


def test_a_pipeline_draws_unless_it_is_told_not_to(model, tokenizer):
    ask = pipeline(TASK, model=model.with_route("y"), tokenizer=tokenizer)
    set_seed(0)
    drawn = ask(TEXTS, max_new_tokens=5)
    set_seed(0)
    assert ask(TEXTS, max_new_tokens=5) == drawn != ask(TEXTS, max_new_tokens=5)


def test_the_route_may_be_an_argument_of_a_call(model, tokenizer, answers, said):
    ask = pipeline(TASK, model=model, tokenizer=tokenizer)
    assert ask(TEXTS, route_ids="y", **OPTIONS) == answers[1]
    assert ask(TEXTS, route_ids=-1, **OPTIONS) == answers[-1]
    assert ask(TEXTS[0], route_ids=2, **OPTIONS) == answers[2][0]
    mixed = ask(TEXTS, route_ids=[1, 0, 1, 2], **OPTIONS)
    assert mixed == [answers[route][index] for index, route in enumerate([1, 0, 1, 2])]
    routed = routed_pipeline(TASK, model, tokenizer=tokenizer)
    assert routed(TEXTS, route_ids=[1, 0, 1, 2], **{**OPTIONS, "batch_size": 2}) == mixed
    with pytest.raises(ValueError, match="`route_ids` is missing.*'x', 'y', 'z'.*with_route"):
        ask(TEXTS)
    assert not new_warnings(said)


def test_a_router_finds_the_route_of_every_prompt(model, tokenizer, answers, said):
    router = CentroidRouter(3, 16)
    router.directions.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(3)))
    encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    evidence = torch.cat([router.evidence(model, {"input_ids": prompt["input_ids"]}) for prompt in encoded])
    router.bias.copy_(-evidence.mean(0))
    model.set_router(router)
    routes = [int(model.infer_routes(input_ids=prompt["input_ids"]).route_ids) for prompt in encoded]
    assert len(set(routes)) > 1
    ask = pipeline(TASK, model=model, tokenizer=tokenizer)
    expected = [answers[route][index] for index, route in enumerate(routes)]
    for batch_size in (4, 1):
        assert ask(TEXTS, **{**OPTIONS, "batch_size": batch_size}) == expected
    assert not new_warnings(said)


@pytest.mark.slow
def test_saving_and_loading_say_nothing(model, tokenizer, answers, said, tmp_path):
    model.generation_config.max_new_tokens = 5
    model.generation_config.do_sample = False
    model.save_pretrained(tmp_path, processing_class=tokenizer)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    return 'evil'\n")
    for loader in (RTLModel, RTLModelForCausalLM, AutoModelForCausalLM):
        for options in ({}, {"trust_remote_code": True}):
            loaded = loader.from_pretrained(tmp_path, **options)
            assert loaded.generation_config.max_new_tokens == 5
            assert loaded.generate(torch.tensor([[9, 8]]), route_ids=0).shape == (1, 7)
    loaded.save_pretrained(tmp_path / "again")
    assert not said.records
    ask = pipeline(TASK, model=str(tmp_path))  # This pipeline follows the model's configuration.
    assert ask(TEXTS, batch_size=4, route_ids="z") == answers[2]


def test_the_code_on_the_page_of_a_language_model_runs(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.generation_config.max_new_tokens = 5
    model.generation_config.do_sample = False
    model.save_pretrained("org/name", processing_class=tokenizer)
    blocks = python_blocks(read_page(write_card("org/name", model_id="org/name")))
    names = {"inputs": dict(tokenizer(TEXTS[:1], return_tensors="pt", return_token_type_ids=False))}
    for block in blocks:
        exec(block, names)
    tokens = model.generate(**names["inputs"], route_ids="x")
    assert len(blocks) == 3 and torch.equal(names["tokens"], tokens)
    assert names["generator"](TEXTS[0], route_ids="x")[0]["generated_text"].endswith(tokenizer.decode(tokens[0, 3:]))
