"""`generate` of routed language models, against each sample's ticket, a plain model, on the sample alone."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TextStreamer,
)

import hf_rtl
from hf_rtl import RTLModel, RTLModelForCausalLM, RTLModelForSeq2SeqLM
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.routers import CentroidRouter
from tests.modeling.random_routers import randomised


KINDS = ["gpt2", "llama", "t5"]
PAD, START, ENDS = 0, 2, [4, 5, 12, 17, 22, 34]
NUM_NEW = 7
ROUTES = [
    [2, 0, 2, 1, 0],  # all of them, two twice
    [1, 1, 1, 1, 1],  # one
    [0, UNION, 0, UNION, 0],  # some, with the union
    ["z", 0, UNION, "x", "y"],  # names among indices
]


@pytest.fixture
def build(request, fill_masks):
    """`build(kind, **changes)` returns a model with random masks, and five prompts of 5 tokens with padding."""

    def make(kind, **changes):
        cls = RTLModelForSeq2SeqLM if kind == "t5" else RTLModelForCausalLM
        if kind == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = LlamaConfig(vocab_size=40, **sizes)
        else:
            config = copy.deepcopy(request.getfixturevalue(f"tiny_{kind}_config"))
        # Untied, since a GPT-2 whose head is its random embedding repeats a single token.
        tokens = {"bos_token_id": START, "eos_token_id": ENDS, "pad_token_id": PAD}
        for name, value in {**tokens, "tie_word_embeddings": kind == "t5", **changes}.items():
            setattr(config, name, value)
        include = ["shared.weight"] if kind == "t5" else []
        model = cls.from_backbone(
            config, route_names=["x", "y", "z"], ticket_task="labels", prune_include=include, seed=0
        )
        # Large weights, so that tickets generate different tokens, which rounding does not change.
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.5, generator=generator)
        fill_masks(model, keep=0.6)
        ids = torch.randint(13, 40, (5, 5), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        for sample, size in enumerate([0, 3, 1, 0, 2]):
            padded = slice(5 - size, 5) if kind == "t5" else slice(0, size)
            ids[sample, padded], mask[sample, padded] = PAD, 0
        return model.eval(), {"input_ids": ids, "attention_mask": mask}

    return make


def extract_tickets(model):
    routes = {UNION: UNION, **dict(enumerate(model.route_names))}
    tickets = {index: model.extract_ticket(index).eval() for index in routes}
    return tickets | {name: tickets[index] for index, name in routes.items()}


def alone(model, inputs, routes, **options):
    """The tokens that each sample's ticket generates for the sample alone, `[rows, length]`."""
    tickets = extract_tickets(model)
    return [
        tickets[route].generate(**{name: value[[index]] for name, value in inputs.items()}, **options)
        for index, route in enumerate(routes)
    ]


def padded(sequences):
    """All rows, padded at the end."""
    rows = [row for rows in sequences for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def told(rows, kind):
    """The tokens that were generated, up to the first end token."""
    answers = []
    for row in rows.tolist():
        answer = row[1 if kind == "t5" else 5 :]
        ends = [position for position, token in enumerate(answer) if token in ENDS]
        answers.append(answer[: ends[0] + 1] if ends else answer)
    return answers


# Against one sample after the other


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_sample_alone(build, kind):
    model, inputs = build(kind)
    lengths = set()
    for routes in ROUTES:
        expected = alone(model, inputs, routes, max_new_tokens=NUM_NEW)
        together = model.generate(**inputs, route_ids=routes, max_new_tokens=NUM_NEW)
        assert together.dtype == torch.int64 and torch.equal(together, padded(expected))
        prompts = inputs.copy()
        ids = prompts.pop("input_ids")
        assert torch.equal(model.generate(ids, **prompts, route_ids=routes, max_new_tokens=NUM_NEW), together)
        if not any(isinstance(route, str) for route in routes):
            tensor = torch.tensor(routes, dtype=torch.int16)
            assert torch.equal(model.generate(**inputs, route_ids=tensor, max_new_tokens=NUM_NEW), together)
        lengths |= {rows.shape[1] for rows in expected}
    assert len(lengths) > 1
    # The tickets generate different tokens, so that the comparison above means something.
    assert len({str(told(model.generate(**inputs, route_ids=r, max_new_tokens=NUM_NEW), kind)) for r in range(3)}) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", [0, "y", UNION, torch.tensor(2)])
def test_one_route_is_its_ticket(build, kind, route):
    model, inputs = build(kind)
    ticket = extract_tickets(model)[route if isinstance(route, str) else int(route)]
    options = {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True, "output_scores": True}
    expected = ticket.generate(**inputs, **options)
    for route_ids in (route, [route if isinstance(route, str) else int(route)] * 5):
        output = model.generate(**inputs, route_ids=route_ids, **options)
        assert type(output) is type(expected) and torch.equal(output.sequences, expected.sequences)
        assert all(torch.equal(one, two) for one, two in zip(output.scores, expected.scores, strict=True))
    one = {name: value[1:2] for name, value in inputs.items()}
    assert torch.equal(
        model.generate(**one, route_ids=[route_ids[0]], max_new_tokens=NUM_NEW),
        ticket.generate(**one, max_new_tokens=NUM_NEW),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind, num_beams, num_sequences", [*((kind, 3, 2) for kind in KINDS), ("gpt2", 2, 1)])
def test_beams_and_several_sequences_of_a_sample(build, kind, num_beams, num_sequences):
    model, inputs = build(kind)
    options = {"max_new_tokens": NUM_NEW, "num_beams": num_beams, "num_return_sequences": num_sequences}
    for routes in ROUTES[:3]:
        expected = [answer for rows in alone(model, inputs, routes, **options) for answer in told(rows, kind)]
        together = model.generate(**inputs, route_ids=routes, **options)
        assert len(together) == 5 * num_sequences and told(together, kind) == expected
    assert len({len(answer) for answer in expected}) > 1


def test_arguments_with_a_row_per_sample_are_split_with_the_prompts(build):
    model, inputs = build("gpt2")
    negative = {
        "negative_prompt_ids": inputs["input_ids"].flip(1),
        "negative_prompt_attention_mask": inputs["attention_mask"].flip(1),
    }
    routes = ROUTES[0]
    options = {"max_new_tokens": 4, "guidance_scale": 3.0}
    expected = padded(alone(model, {**inputs, **negative}, routes, **options))
    together = model.generate(**inputs, **negative, route_ids=routes, **options)
    assert torch.equal(together, expected)
    assert not torch.equal(together, model.generate(**inputs, route_ids=routes, max_new_tokens=4))
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"] = embeddings.detach()
    expected = padded(alone(model, inputs, routes, max_new_tokens=4))
    assert torch.equal(model.generate(**inputs, route_ids=routes, max_new_tokens=4), expected)


def test_settings_may_be_tensors_as_long_as_the_batch(build):
    model, inputs = build("gpt2")
    options = {"max_new_tokens": NUM_NEW, "eos_token_id": torch.tensor(ENDS[1:]), "pad_token_id": PAD}
    expected = padded(alone(model, inputs, ROUTES[0], **options))
    assert torch.equal(model.generate(**inputs, route_ids=ROUTES[0], **options), expected)


# How it is done


def test_a_route_is_masked_once_and_the_cache_is_used(build, monkeypatch):
    model, inputs = build("gpt2", eos_token_id=None)
    masked, lengths = [], []
    get = model.tickets.get

    def noted(_, route):
        assert not torch.is_grad_enabled()
        masked.append(route)
        return get(_, route)

    monkeypatch.setattr(model.tickets, "get", noted)
    model.backbone.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    model.generate(**inputs, route_ids=[2, 0, 2, 0, 0], max_new_tokens=4)
    assert masked == [0, 2]
    assert lengths == [(3, 5), (3, 1), (3, 1), (3, 1), (2, 5), (2, 1), (2, 1), (2, 1)]


def test_a_context_or_a_view_tells_the_route(build):
    model, inputs = build("gpt2")
    expected = model.generate(**inputs, route_ids="y", max_new_tokens=4)
    view = model.with_route("y")
    assert torch.equal(view.generate(**inputs, max_new_tokens=4), expected)
    with pytest.raises(ValueError, match="`route_ids` was given to a view with the fixed route 'y'"):
        view.generate(**inputs, route_ids=0)
    with model.route_context(1):
        for route_ids in (None, "y", [1] * 5):
            assert torch.equal(model.generate(**inputs, route_ids=route_ids, max_new_tokens=4), expected)
        with pytest.raises(ValueError, match=r"`route_ids` = \[1, 0, .* inside the active route_context\(1\)"):
            model.generate(**inputs, route_ids=[1, 0, 1, 1, 1])
        with pytest.raises(ValueError, match=r"inside the active route_context\(1\)"):
            model.with_route("x").generate(**inputs)


@pytest.mark.parametrize(
    "route_ids, error, message",
    [
        (None, ValueError, "`route_ids` is missing, and no router was fitted.*'x', 'y', 'z'"),
        ("w", ValueError, "'w'"),
        (3, ValueError, "3"),
        ([0, 1], ValueError, "`route_ids` has 2 entries for a batch of 5"),
        ([], ValueError, "`route_ids` is empty"),
        (torch.rand(5), TypeError, "`route_ids` must be integers"),
    ],
)
def test_bad_route_ids(build, route_ids, error, message):
    model, inputs = build("gpt2")
    with pytest.raises(error, match=message):
        model.generate(**inputs, route_ids=route_ids)


def test_without_a_prompt(build):
    model, inputs = build("gpt2")
    expected = model.extract_ticket("y").generate(max_new_tokens=4)
    for route in (1, "y"):
        assert torch.equal(model.generate(route_ids=route, max_new_tokens=4), expected)
    assert torch.equal(model.with_route("y").generate(input_ids=None, max_new_tokens=4), expected)
    with pytest.raises(ValueError, match=r"`input_ids` is missing, and `route_ids` = \[1, 1\].*route_ids='x'"):
        model.generate(route_ids=[1, 1])
    with pytest.raises(ValueError, match="no router was fitted"):
        model.generate()
    model.set_router(randomised(CentroidRouter(3, 16)))
    with pytest.raises(ValueError, match="`input_ids` is missing, and `route_ids` = None"):
        model.generate()
    with pytest.raises(ValueError, match="the batch has no samples"):
        model.generate(inputs["input_ids"][:0], route_ids=1)


# Where a router decides


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_decides_once_on_the_prompts_whatever_their_padding(build, kind, monkeypatch):
    model, inputs = build(kind)
    router = CentroidRouter(3, 16)
    router.directions.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    model.set_router(router)
    without_padding = [ids[mask.bool()][None] for ids, mask in zip(*inputs.values(), strict=True)]
    evidence = torch.cat([router.evidence(model, {"input_ids": ids}) for ids in without_padding])
    router.bias.copy_(-evidence.mean(0))
    routes = [int(model.infer_routes(input_ids=ids).route_ids) for ids in without_padding]
    assert len(set(routes)) > 1
    if kind == "gpt2":  # Padding on the left would shift absolute positions.
        assert model.infer_routes(**inputs).route_ids.tolist() != routes
    expected = model.generate(**inputs, route_ids=routes, max_new_tokens=NUM_NEW)
    decisions = []
    infer_routes = model.infer_routes

    def noted(**prompts):
        assert prompts.keys() <= {"input_ids", "attention_mask", "position_ids"}
        decisions.append(infer_routes(**prompts))
        return decisions[-1]

    monkeypatch.setattr(model, "infer_routes", noted)
    ids = inputs.pop("input_ids")
    assert torch.equal(model.generate(input_ids=ids, **inputs, max_new_tokens=NUM_NEW), expected)
    # Without `guidance_scale`, a negative prompt changes nothing.
    assert torch.equal(model.generate(ids, **inputs, negative_prompt_ids=ids, max_new_tokens=NUM_NEW), expected)
    assert [decision.route_ids.tolist() for decision in decisions] == [routes] * 2
    with model.route_context(0):
        model.generate(ids, **inputs, max_new_tokens=2)
    model.with_route(0).generate(ids, **inputs, max_new_tokens=2)
    assert len(decisions) == 2
    with pytest.raises(ValueError, match="routers decide in evaluation mode only"):
        model.train().generate(ids, **inputs)


# Options for the whole batch


class Shift(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.roll(1, dims=1)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "return_dict_in_generate"),
        ({"streamer": TextStreamer(None)}, "streamer"),
        ({"prefix_allowed_tokens_fn": lambda index, ids: [7]}, "prefix_allowed_tokens_fn"),
        ({"encoder_outputs": object()}, "encoder_outputs"),
        ({"past_key_values": object()}, "past_key_values"),
    ],
)
def test_what_cannot_be_split_by_route_is_refused(build, options, name):
    model, inputs = build("gpt2")
    message = f"`{name}` is not allowed for a batch whose samples may be of several routes.*once per route"
    model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("it was refused too late"))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, route_ids=ROUTES[0], **options)
    # With a router, these are refused whatever it would decide.
    model.set_router(CentroidRouter(3, 16))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **options)


def test_options_for_the_whole_batch_need_one_route_or_one_sample(build):
    model, inputs = build("gpt2")
    model.generation_config.return_dict_in_generate = True
    with pytest.raises(ValueError, match="`return_dict_in_generate`"):
        model.generate(**inputs, route_ids=ROUTES[0])
    plain = {"return_dict_in_generate": False, "max_new_tokens": 2}
    assert model.generate(**inputs, route_ids=ROUTES[0], **plain).shape == (5, 7)
    plain = {"generation_config": GenerationConfig(return_dict_in_generate=False, max_new_tokens=2)}
    assert model.generate(**inputs, route_ids=ROUTES[0], **plain).shape == (5, 7)
    model.set_router(CentroidRouter(3, 16))
    one = {name: value[:1] for name, value in inputs.items()}
    assert model.generate(**one, max_new_tokens=2).sequences.shape == (1, 7)

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    sequence = model.generate(**one, streamer=streamer, max_new_tokens=2).sequences
    assert streamer.tokens == [*sequence[0].tolist(), "end"]


def test_processors_and_criteria_are_called_for_every_route(build):
    model, inputs = build("gpt2")
    options = {"logits_processor": LogitsProcessorList([Shift()]), "max_new_tokens": 3}
    together = model.generate(**inputs, route_ids=ROUTES[0], **options)
    assert torch.equal(together, padded(alone(model, inputs, ROUTES[0], **options)))
    assert not torch.equal(together, model.generate(**inputs, route_ids=ROUTES[0], max_new_tokens=3))


def test_the_end_token_pads_where_there_is_no_pad_token(build):
    model, inputs = build("gpt2")
    model.generation_config.suppress_tokens = [PAD, 39]
    expected = model.generate(**inputs, route_ids=ROUTES[0], max_new_tokens=NUM_NEW)
    model.generation_config.pad_token_id = None
    ended = model.generate(**inputs, route_ids=ROUTES[0], max_new_tokens=NUM_NEW)
    assert told(ended, "gpt2") == told(expected, "gpt2")
    assert torch.equal(ended[:, 5:], torch.where(expected[:, 5:] == PAD, ENDS[0], expected[:, 5:]))
    assert (ended[:, -1] == ENDS[0]).any()
    other = model.generate(**inputs, route_ids=ROUTES[0], max_new_tokens=NUM_NEW, pad_token_id=39)
    assert torch.equal(other[:, 5:], torch.where(expected[:, 5:] == PAD, 39, expected[:, 5:]))

    class TwoForTwo(MaxTimeCriteria):
        """Ends the generation for a batch of two samples after two tokens."""

        def __init__(self):
            pass

        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), len(input_ids) == 2 and input_ids.shape[1] == 7)

    options = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([TwoForTwo()]), "max_new_tokens": 4}
    assert model.generate(**inputs, route_ids=[0, 1, 2, 1, 0], max_new_tokens=4, eos_token_id=None).shape == (5, 9)
    with pytest.raises(ValueError, match=r"sequences of \[7, 9\] tokens.*pass `pad_token_id=`"):
        model.generate(**inputs, route_ids=[0, 1, 0, 0, 1], **options)
    rows = model.generate(**inputs, route_ids=[0, 1, 0, 0, 1], pad_token_id=PAD, **options)
    assert (rows[[1, 4], 7:] == PAD).all() and (rows[[0, 2, 3], 7:] != PAD).any()


# Sampling and training


def test_sampling_draws_for_one_route_after_the_other(build):
    model, inputs = build("gpt2")
    routes, options = [2, UNION, 0, 2, UNION], {"do_sample": True, "max_new_tokens": NUM_NEW, "temperature": 3.0}
    torch.manual_seed(3)
    sampled = model.generate(**inputs, route_ids=routes, num_return_sequences=2, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, route_ids=routes, num_return_sequences=2, **options), sampled)
    assert not torch.equal(model.generate(**inputs, route_ids=routes, num_return_sequences=2, **options), sampled)

    torch.manual_seed(3)
    tickets, rows = extract_tickets(model), {}
    for route in (UNION, 0, 2):
        positions = [index for index, own in enumerate(routes) if own == route]
        own = {name: value[positions] for name, value in inputs.items()}
        generated = tickets[route].generate(**own, num_return_sequences=2, **options)
        rows |= {position: generated[2 * i : 2 * i + 2] for i, position in enumerate(positions)}
    assert torch.equal(sampled, padded([rows[position] for position in range(5)]))


def test_training_mode_is_that_of_transformers(build):
    model, inputs = build("gpt2", resid_pdrop=0.4)
    quiet = model.generate(**inputs, route_ids="y", max_new_tokens=NUM_NEW)
    ticket = model.extract_ticket("y").train()
    model.train()
    for module in (model, ticket):
        torch.manual_seed(1)
        output = module.generate(**inputs, **({"route_ids": "y"} if module is model else {}), max_new_tokens=NUM_NEW)
        if module is model:
            expected = output
    assert torch.equal(output, expected) and not torch.equal(output, quiet)
    assert model.training and model.backbone.training and not model.routes_since_update
    # Generation makes no graph, and weights that were masked without a graph do not spoil a training.
    model.eval().generate(**inputs, route_ids="y", max_new_tokens=1)
    model(**inputs, labels=inputs["input_ids"], route_ids="y").loss.backward()
    assert model.routes_since_update == {1}


# Its configuration, and the models that can generate


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_generation_config_is_the_backbones_and_is_saved(build, kind, tmp_path):
    model, inputs = build(kind)
    assert model.generation_config is model.backbone.generation_config
    assert model.generation_config.eos_token_id == ENDS
    tokens = {"pad_token_id": PAD, "eos_token_id": ENDS, "decoder_start_token_id": PAD if kind == "t5" else None}
    model.generation_config = GenerationConfig(max_new_tokens=3, num_beams=2, **tokens)
    assert model.generation_config is model.backbone.generation_config
    assert model.with_route(0).generation_config is model.generation_config
    expected = model.generate(**inputs, route_ids=ROUTES[0])
    assert torch.equal(
        expected, model.generate(**inputs, route_ids=ROUTES[0], generation_config=model.generation_config)
    )
    clone = copy.deepcopy(model)
    clone.generation_config.max_new_tokens = 1
    assert model.generation_config.max_new_tokens == 3

    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["num_beams"] == 2
    for loader in (RTLModel, type(model), model.backbone_class):
        loaded = loader.from_pretrained(tmp_path / "model")
        assert loaded.generation_config is loaded.backbone.generation_config
        assert (loaded.generation_config.max_new_tokens, loaded.generation_config.num_beams) == (3, 2)
        assert torch.equal(loaded.generate(**inputs, route_ids=ROUTES[0]), expected)
    given = GenerationConfig(max_new_tokens=2, **tokens)
    loaded = RTLModel.from_pretrained(tmp_path / "model", generation_config=given)
    assert loaded.generation_config.max_new_tokens == 2 and loaded.generation_config is not given

    ticket = loaded.extract_ticket("z")
    assert ticket.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert ticket.generation_config is not loaded.generation_config
    ticket.save_pretrained(tmp_path / "ticket")
    assert model.backbone_class.from_pretrained(tmp_path / "ticket").generation_config.max_new_tokens == 2


def test_a_model_that_was_saved_without_a_generation_config(build, tmp_path):
    model, inputs = build("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = RTLModel.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == ENDS and loaded.generation_config.pad_token_id == PAD
    options = {"route_ids": ROUTES[0], "max_new_tokens": NUM_NEW}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


def test_models_can_generate_if_their_backbones_can(tiny_bert_config, tiny_attention_config, tmp_path, monkeypatch):
    generating = [cls for cls in hf_rtl.modeling.modeling_rtl.TASK_CLASSES if cls.can_generate()]
    assert generating == [RTLModelForCausalLM, RTLModelForSeq2SeqLM]
    routes = {"route_names": ["x", "y"], "ticket_task": "labels", "seed": 0}
    other = hf_rtl.RTLModelForMaskedLM.from_backbone(tiny_bert_config, **routes)
    assert not other.can_generate() and not hasattr(other, "generate") and not hasattr(other, "generation_config")
    # A backbone without `generate`.
    backbone = hf_rtl.RTLModelForSequenceClassification.from_backbone(tiny_attention_config, **routes).backbone
    assert isinstance(backbone, PreTrainedModel) and not backbone.can_generate()
    builds = AutoModelForCausalLM._model_mapping._extra_content
    monkeypatch.setitem(builds, type(backbone.config), type(backbone))
    model = RTLModelForCausalLM.from_backbone(backbone, **routes)
    assert not model.can_generate() and not model.with_route("x").can_generate()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
