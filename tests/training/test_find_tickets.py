"""Tickets in one pass: what they keep, compared with a naive search; refusals; nothing else changes."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import BertConfig, BertForSequenceClassification

from hf_rtl import RTLModelForCausalLM, RTLModelForSequenceClassification, find_tickets
from hf_rtl.model_card import write_card
from hf_rtl.modeling import modeling_rtl
from tests.modeling.small_backbones import build, units_found_once


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


LANGUAGES = ["c", "french", "german"]


def texts(number=36, seed=0):
    """Texts of different lengths; a language has tokens of its own."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        length, route = int(generator.integers(3, 7)), index % 3
        tokens = (generator.integers(3, 15, length) + 12 * route).tolist()
        rows.append({"input_ids": tokens, "language": LANGUAGES[route]})
    return Dataset.from_list(rows)


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": torch.stack([pad(row, (0, longest - len(row))) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows]),
    }


def search(network, dataset=None, **options):
    given = {"route_column": "language", "sparsity": 0.5, "num_batches": 2, "batch_size": 4, "data_collator": collate}
    return find_tickets(network, texts() if dataset is None else dataset, **{**given, **options})


def saved_bytes(model, folder, **options):
    model.save_pretrained(folder, **options)
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def drawn(dataset, route, seed=0, number=8):
    """The samples of a route that a search reads."""
    own = np.flatnonzero(np.array(dataset["language"]) == LANGUAGES[route])
    return np.random.default_rng([seed, route]).permutation(own)[:number].tolist()


def layer_inputs(network, names, samples):
    """The inputs of layers on single samples, float64 `[positions, channels]`."""
    found = {name: [] for name in names}
    hooks = [
        network.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in samples:
            network(input_ids=torch.tensor([sample["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_ticket_keeps_the_units_that_do_most_on_its_route(name):
    network, inputs = build(name)
    network, dataset = network.double(), texts()
    layers = modeling_rtl.find_units(network, inputs)
    model = search(network)
    assert type(model) is RTLModelForCausalLM and model.route_names == LANGUAGES and not model.training
    for route in range(3):
        rows = layer_inputs(network, [layer.readers[0][0] for layer in layers], dataset.select(drawn(dataset, route)))
        masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[route], strict=True))
        expected = {key: torch.ones_like(mask) for key, mask in masks.items()}
        for layer in layers:
            ((reader, dim),) = layer.readers
            weight, scores = network.get_parameter(reader).detach(), []
            for unit in range(layer.num_units):
                mean = math.fsum(float(value) ** 2 for value in rows[reader][:, unit]) / len(rows[reader])
                scores.append(mean * math.fsum(float(value) ** 2 for value in weight.select(dim, unit)))
            best = sorted(range(layer.num_units), key=lambda unit: (-scores[unit], unit))
            # Half of 24 is 12, and the larger of two multiples of 8 as near is 16; half of 64 is 32.
            removed = best[{24: 16, 64: 32}[layer.num_units] :]
            for (place, axis), units in layer.places.items():
                if place in expected:
                    for unit in removed:
                        for index in units[unit].tolist():
                            expected[place].select(axis, index).fill_(False)
        assert all(torch.equal(masks[key], expected[key]) for key in masks)
    assert float(model.mask_bank.similarity()[0, 1]) < 1


def test_single_weights_are_ranked_within_their_row_by_the_inputs_that_they_multiply():
    network, _ = build("gpt2")
    network, dataset = network.double(), texts()
    model = search(network, granularity="weight")
    names = model.mask_bank.weight_names
    rows = layer_inputs(network, names, dataset.select(drawn(dataset, 1)))
    for name, mask in zip(names, model.mask_bank["french"], strict=True):
        weight = network.get_parameter(name)  # of `Conv1D`: [inputs, outputs]
        norms = [math.sqrt(math.fsum(float(value) ** 2 for value in column)) for column in rows[name].T]
        for output in range(weight.shape[1]):
            scores = [abs(float(weight[i, output])) * norms[i] for i in range(len(norms))]
            best = sorted(range(len(norms)), key=lambda i: (-scores[i], i))[: len(norms) // 2]
            assert mask[:, output].nonzero().flatten().tolist() == sorted(best)


def test_a_unit_goes_in_all_its_tensors_and_tickets_get_smaller():
    network, inputs = build("llama")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    model = search(network, sparsity=0.3, round_to=4)
    first = [model.mask_bank[route] for route in range(3)]
    again = search(model, sparsity=0.6, round_to=4)
    assert again is model
    for route in range(3):
        for small, large in zip(model.mask_bank[route], first[route], strict=True):
            assert not (small & ~large).any()
        ticket = model.extract_ticket(route, small=True)
        # 70 % of 24 is 16.8, and the nearest multiple of 4 is 16; 40 % is 9.6, so 8.
        assert ticket.config.intermediate_size == 8
        with torch.no_grad():
            found, expected = ticket(**inputs).logits, model(**inputs, route_ids=route).logits
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.slow
def test_refitted_readers_belong_to_routes_and_are_saved(tmp_path):
    network, inputs = build("bert")
    network.config.problem_type = "single_label_classification"
    rows = texts().add_column("label", [0, 1] * 18)
    plain, model = (search(copy.deepcopy(network), rows, refit=refit) for refit in (False, True))
    down = [f"bert.encoder.layer.{layer}.output.dense" for layer in range(2)]
    assert model.private_parameters.names == [f"{name}.{kind}" for name in down for kind in ("weight", "bias")]
    assert set(plain.mask_bank.weight_names) - set(model.mask_bank.weight_names) == {f"{name}.weight" for name in down}
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        dense = network(**inputs).logits
        for route in LANGUAGES:
            expected = model(**inputs, route_ids=route).logits
            assert torch.equal(loaded(**inputs, route_ids=route).logits, expected)
            assert torch.equal(model.extract_ticket(route)(**inputs).logits, expected)
            small = model.extract_ticket(route, small=True)
            assert small.config.intermediate_size == 16
            assert torch.allclose(small(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        errors = [
            sum(float((found(**inputs, route_ids=route).logits - dense).square().mean()) for route in LANGUAGES)
            for found in (plain, model)
        ]
    assert errors[1] < errors[0]
    private = model.private_parameters
    sizes = {name: rows[0].numel() for name, rows in zip(private.names, private.rows, strict=True)}
    # In files a route has the columns of the 16 neurons that it keeps, of 24.
    assert saved_bytes(model, tmp_path / "compact", compact=True) == model.footprint()["compact_bytes"]
    masked = sum(size for name, size in sizes.items() if name.endswith("weight"))
    columns = load_file(tmp_path / "compact" / "model.safetensors")
    assert sum(columns[f"compact.p000{2 * layer}"].numel() for layer in range(2)) == 3 * masked * 16 // 24
    more = model.footprint()["full_bytes"] - plain.footprint()["full_bytes"]
    # Each route has rows of its own; masks of these weights, two bits of a byte each in every row, are gone.
    assert more == 4 * 3 * sum(sizes.values()) - 3 * masked // 8


@pytest.mark.slow
def test_a_refit_of_one_ticket_leaves_the_others(tmp_path):
    """The biases of GPT-2's removed neurons would be seen if the readers of the other routes were whole."""
    network, inputs = build("gpt2")
    plain, every, one = (search(copy.deepcopy(network), refit=refit) for refit in (False, True, ["german"]))
    with torch.no_grad():
        for route in LANGUAGES:
            expected = (every if route == "german" else plain)(**inputs, route_ids=route).logits
            assert torch.equal(one(**inputs, route_ids=route).logits, expected)
            assert one.extract_ticket(route, small=True).config.n_inner == 32
    one.save_pretrained(tmp_path)
    assert "was solved anew for german, by least squares" in " ".join(write_card(one, tmp_path).read_text().split())


@pytest.mark.parametrize("refit", [False, True])
def test_a_stock_model_gets_its_tickets_from_files_alone(tmp_path, refit):
    network, inputs = build("llama")
    network.save_pretrained(tmp_path / "stock")
    model = search(network, refit=refit)
    index = model.save_tickets(tmp_path / "tickets")
    assert index["format_version"] == 2  # a bit per neuron
    again = RTLModelForCausalLM.from_backbone(tmp_path / "stock", tickets=tmp_path / "tickets").eval()
    assert again.route_names == LANGUAGES and again.private_parameters.names == model.private_parameters.names
    with torch.no_grad():
        for route in LANGUAGES:
            expected = model(**inputs, route_ids=route).logits
            assert torch.equal(again(**inputs, route_ids=route).logits, expected)
    some = RTLModelForCausalLM.from_backbone(network, tickets=tmp_path / "tickets", route_names=["german"])
    assert some.route_names == ["german"]
    with torch.no_grad():
        network.model.embed_tokens.weight[3, 0] += 1
    network.save_pretrained(tmp_path / "other revision")
    with pytest.raises(ValueError, match="made from another base than this model.*model.embed_tokens.weight"):
        RTLModelForCausalLM.from_backbone(tmp_path / "other revision", tickets=tmp_path / "tickets")
    with pytest.raises(ValueError, match="holds no tickets"):
        RTLModelForCausalLM.from_backbone(network, tickets=tmp_path / "stock")
    with pytest.raises(ValueError, match="`route_names` and `ticket_task` are needed.*or `tickets`"):
        RTLModelForCausalLM.from_backbone(network)


def test_the_seed_draws_samples_and_random_tickets():
    network, _ = build("llama")
    found = {
        (criterion, seed): search(network, criterion=criterion, seed=seed).mask_bank.fingerprint()
        for criterion in ("activity", "random", "magnitude")
        for seed in (0, 1)
    }
    assert found["magnitude", 0] == found["magnitude", 1] and len(set(found.values())) == 5
    state = torch.random.get_rng_state()
    assert search(network).mask_bank.fingerprint() == found["activity", 0]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_network_is_traced_once(monkeypatch):
    traced = []
    found = modeling_rtl.find_units
    monkeypatch.setattr(modeling_rtl, "find_units", lambda *given: traced.append(given) or found(*given))
    search(build("llama")[0], refit=True).extract_ticket("german", small=True)
    assert len(traced) == 1


def test_it_says_what_was_asked_and_what_came(capsys, tmp_path):
    network, _ = build("llama")
    model = search(network)
    printed = capsys.readouterr().out
    assert "routes       3, of column 'language': c, french, german" in printed
    assert "model_class  RTLModelForCausalLM" in printed
    # 16 of 24 units are kept; 2,304 of the 3,840 prunable weights are theirs.
    lines = [line.split() for line in printed.splitlines()]
    assert [
        "removed",
        "(asked:",
        "50.0%",
        "of",
        "units)",
        "units",
        "prunable",
        "weights",
        "all",
        "parameters",
    ] in lines
    total = sum(parameter.numel() for parameter in network.parameters())
    removed = 2 * 3 * 8 * 16
    share = f"{removed / model.mask_bank.num_weights:.1%}"
    assert ["french", "33.3%", share, f"{removed / total:.1%}"] in lines
    model.save_pretrained(tmp_path)
    assert model.partition_rule.column == "language"


MISTAKES = {
    "a percentage": ({"sparsity": 50}, "`sparsity` is 50; allowed are fractions.*Did you mean 0.5"),
    "a granularity": ({"granularity": "head"}, "`granularity` must be one of 'weight', 'neuron', 'channel', got"),
    "one that is not there": ({"granularity": "channel"}, "LlamaForCausalLM has no channel that can be pruned"),
    "a criterion": ({"criterion": "fisher"}, "`criterion` must be one of 'activity', 'magnitude', 'random'"),
    "no batches": ({"num_batches": 0}, "`num_batches` must be at least 1, got 0"),
    "a refit of weights": ({"granularity": "weight", "refit": True}, "`refit` is for units"),
    "a refit of one": ({"refit": "german"}, "`refit` is 'german'; allowed are True, False, or a list of names of"),
    "a refit of none": ({"refit": ["greek"]}, r"`refit` is \['greek'\]; allowed are"),
    "a column": ({"route_column": "lang"}, "`route_column` = 'lang' is not in the data set"),
    "no mask": ({"prune_exclude": ["*down_proj*"]}, "no mask covers what reads model.layers.0.mlp.gate_proj"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    options, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=f"(?s){words}"):
        search(build("llama")[0], **options)


def test_after_a_refusal_a_routed_model_is_as_before():
    model = search(build("llama")[0])
    before = model.mask_bank.fingerprint()
    with pytest.raises(ValueError, match="the data have no sample of 'german'; every route needs some"):
        search(model, texts().filter(lambda row: row["language"] != "german"))
    broken = build("llama")[0]
    broken.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the scores of model.layers.0.mlp.gate_proj are not all finite"):
        search(broken)
    with pytest.raises(ValueError, match="keeps 24 units of model.layers.0.mlp.gate_proj, which has only 16 left"):
        search(model, sparsity=0.0)
    assert model.mask_bank.fingerprint() == before and model.active.route is None
    assert search(model, sparsity=0.7) is model


@pytest.mark.slow
def test_a_refit_of_channels_keeps_the_statistics_of_routes():
    """Convolutions are left as they are; what a given model has for each route goes along."""
    network, _ = build("bottlenecks")
    generator = np.random.default_rng(0)
    rows = [{"pixel_values": generator.normal(size=(3, 32, 32)).tolist(), "place": "ab"[i % 2]} for i in range(8)]
    images = Dataset.from_list(rows).with_format("torch")
    options = {"route_column": "place", "granularity": "channel", "num_batches": 1, "batch_size": 4, "round_to": 2}
    model = find_tickets(network, images, sparsity=0.25, **options)
    for statistics in model.norm_statistics.rows:
        statistics.copy_(torch.arange(len(statistics))[:, None].expand_as(statistics) if statistics.ndim > 1 else 7)
    again = find_tickets(model, images, sparsity=0.5, refit=True, **options)
    assert again is not model and again.private_parameters.names == []
    for old, new in zip(model.norm_statistics.rows, again.norm_statistics.rows, strict=True):
        assert torch.equal(old, new)
    assert float(again.mask_bank.density()[0]) < float(model.mask_bank.density()[0])


@pytest.mark.parametrize("refit", [False, True])
def test_layers_that_stay_whole_are_named(refit, capsys):
    left = "model.layers.1.mlp.down_proj.weight"
    model = search(build("llama")[0], prune_exclude=[left], refit=refit)
    printed = capsys.readouterr().out
    assert (
        f"Some units stay in all tickets: no mask covers what reads model.layers.1.mlp.gate_proj (read by {left})."
        in printed
    )
    assert printed.count("Some units stay") == 1
    assert model.extract_ticket("german").get_parameter(left).ne(0).any(0).all()


def test_gradient_checkpointing_and_a_training_mode_change_nothing():
    network, _ = build("llama")
    expected = search(copy.deepcopy(network)).mask_bank.fingerprint()
    network.gradient_checkpointing_enable()
    assert search(network.train()).mask_bank.fingerprint() == expected


def test_what_was_found_is_printed_and_is_on_the_card(capsys, tmp_path):
    model = search(build("llama")[0], refit=True)
    printed = capsys.readouterr().out
    kept = []
    for route in range(3):
        ticket = model.extract_ticket(route)
        downs = [ticket.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight") for layer in range(2)]
        kept.append({(layer, unit) for layer in range(2) for unit in range(24) if downs[layer][:, unit].any()})
    alike = [len(kept[one] & kept[two]) / len(kept[one] | kept[two]) for one, two in ((0, 1), (0, 2), (1, 2))]
    union = len(kept[0] | kept[1] | kept[2]) / 48
    assert f"At least one ticket keeps {union:.1%} of the units; mean Jaccard similarity of two tickets" in printed
    assert f"two tickets {sum(alike) / 3:.3f}." in printed
    (report,) = model.training_run["rounds"]
    assert report["kept"] == dict(zip(LANGUAGES, model.mask_bank.count().tolist(), strict=True))
    model.save_pretrained(tmp_path)
    card = " ".join(write_card(model, tmp_path).read_text().split())
    assert "were found in one pass over at most" in card and "keeps the neurons of largest activity" in card
    assert "solved anew for each route" in card and "small=True" in card and "Made with hf_rtl" in card
    model.mask_bank["german"] = [torch.ones_like(mask) for mask in model.mask_bank["german"]]
    assert "How the tickets were found and trained is not known" in write_card(model, tmp_path).read_text()


@pytest.mark.slow
def test_tickets_of_membership_need_no_more_than_a_stock_model_with_one_logit(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        problem_type="multi_label_classification",
    )
    network = BertForSequenceClassification(config).eval()
    rows = [{"input_ids": torch.randint(1, 20, (5,)), "label": index % 3} for index in range(24)]
    model = find_tickets(network, rows, route_column="label", sparsity=0.5)
    assert model.config.ticket_task == "membership"
    model.save_tickets(tmp_path / "tickets")
    again = RTLModelForSequenceClassification.from_backbone(network, tickets=tmp_path / "tickets").eval()
    assert again.route_names == ["0", "1", "2"]
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    some = RTLModelForSequenceClassification.from_backbone(
        network, tickets=tmp_path / "tickets", route_names=["2", "0"]
    )
    assert some.route_names == ["2", "0"]
    with pytest.raises(ValueError, match="two"):
        RTLModelForSequenceClassification.from_backbone(network, tickets=tmp_path / "tickets", route_names=["1"])
