"""Fused experts: their neurons, what they are given, and smaller tickets, against loops over positions."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2MoeConfig,
)

from hf_rtl import RTLModelForCausalLM, find_tickets
from hf_rtl.modeling import modeling_rtl
from hf_rtl.modeling.experts import expert_inputs, fused_matrices
from hf_rtl.modeling.layer_inputs import LayerInputs
from hf_rtl.modeling.small_ticket import remove_units
from hf_rtl.modeling.units import find_units
from hf_rtl.training.activity import add_up, input_squares
from tests.modeling.small_backbones import find_units_once, units_found_once


COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, **ROUTED, intermediate_size=16, num_local_experts=4),
    "qwen2": Qwen2MoeConfig(
        **COMMON, **ROUTED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=12
    ),
    # Interleaved gates, matrices of inputs by outputs, biases.
    "gpt-oss": GptOssConfig(**COMMON, **ROUTED, intermediate_size=16, num_local_experts=4, head_dim=8),
    # Without gates.
    "nemotron": NemotronHConfig(
        **{**COMMON, "num_hidden_layers": 2}, **ROUTED, layers_block_type=["attention", "moe"], n_routed_experts=4,
        n_group=1, topk_group=1, moe_intermediate_size=16, moe_shared_expert_intermediate_size=12,
    ),
}  # fmt: skip


# Nemotron rounds the shares of its experts, and its logits, to float32.
TOLERANCE = {"mixtral": 1e-12, "qwen2": 1e-12, "gpt-oss": 1e-12, "nemotron": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def _units_found_once():
    with units_found_once(modeling_rtl):
        yield


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim < 2))
    return network


def experts_of(network):
    ((name, module),) = [(name, m) for name, m in network.named_modules() if hasattr(m, "_apply_gate")]
    return name, module


def given(network, samples):
    """What the experts are given on samples, one by one."""
    calls = []
    _, module = experts_of(network)
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for sample in samples:
            network(**sample)
    hook.remove()
    return [torch.cat(parts) for parts in zip(*calls, strict=True)]


def padded(rows, side):
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = pad_sequence(rows, batch_first=True, padding_side=side)
    return {"input_ids": inputs, "attention_mask": mask, "position_ids": positions}


def texts(number=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 40, (3 + index % 4,), generator=generator) for index in range(number)]


def naive_sums(network, rows):
    """Sums of squares of what the two matrices of each Mixtral expert multiply: loops over positions and choices."""
    _, module = experts_of(network)
    up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    x, chosen, shares = given(network, [{"input_ids": row[None]} for row in rows])
    made = [[0.0 for _ in range(up.shape[2])] for _ in up]
    read = [[0.0 for _ in range(down.shape[2])] for _ in down]
    for position in range(len(x)):
        for slot in range(2):
            expert, share = int(chosen[position, slot]), float(shares[position, slot])
            values = x[position].tolist()
            for channel, value in enumerate(values):
                made[expert][channel] += value**2
            for unit in range(down.shape[2]):
                gate, value = (
                    math.fsum(float(w) * v for w, v in zip(up[expert, row], values, strict=True))
                    for row in (unit, unit + down.shape[2])
                )
                read[expert][unit] += (share * value * gate / (1 + math.exp(-gate))) ** 2
    return made, read, len(x)


@pytest.mark.parametrize("side", ["left", "right"])
def test_experts_are_measured_on_the_positions_that_they_get(side):
    network, rows = build("mixtral"), texts(6)
    name, _ = experts_of(network)
    names = [f"{name}.gate_up_proj", f"{name}.down_proj"]
    made, read, count = naive_sums(network, rows)
    for sizes in ([6], [1, 3, 2]):
        parts = iter(rows)
        batches = [padded([next(parts) for _ in range(size)], side) for size in sizes]
        for per_weight in (False, True):
            found = add_up(input_squares(network, names, batches, per_weight=per_weight))
            for key, expected in zip(names, (made, read), strict=True):
                assert found[key][1] == count
                # Mixtral has norms in float32, which round what differs in the last bit.
                torch.testing.assert_close(found[key][0], torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_neurons_of_experts_give_what_the_experts_give(name):
    """What is measured, times the matrices that read it, is the output: for every layout and activation."""
    network = build(name)
    _, module = experts_of(network)
    x, chosen, shares = given(network, [{"input_ids": row[None]} for row in texts(4)])
    with torch.no_grad():
        expected = module(x, chosen, shares)
        found = torch.zeros_like(expected)
        for expert, part in enumerate(expert_inputs(module, "down_proj", x, chosen, shares).parts):
            weight = module.down_proj[expert]
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            found.index_add_(0, rows, linear(part, weight.T if module.is_transposed else weight))
            if module.has_bias:
                found.index_add_(0, rows, shares[rows, slots, None] * module.down_proj_bias[expert])
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tickets_without_neurons_of_experts_are_smaller(name, tmp_path):
    network = build(name)
    experts, module = experts_of(network)
    inputs = {"input_ids": torch.randint(3, 40, (2, 6))}
    found = find_units_once(network, inputs)
    layers = [layer for layer in found if layer.expert is not None]
    assert [(layer.name, layer.num_units) for layer in layers] == [(f"{experts}.{expert}", 16) for expert in range(4)]
    up, down = fused_matrices(module)
    # Every expert loses other neurons; all keep as many as the largest needs, in eights.
    removed = [torch.arange(16) < 9, torch.arange(16) % 2 > 0, torch.arange(16) % 3 > 0, torch.arange(16) > 5]
    rows, columns = (-1, -2) if module.is_transposed else (-2, -1)
    with torch.no_grad():
        for expert, units in enumerate(removed):
            getattr(module, down)[expert].index_fill_(columns, units.nonzero().flatten(), 0)
            for unit in units.nonzero().flatten().tolist():
                pair = {"gpt-oss": [2 * unit, 2 * unit + 1], "nemotron": [unit]}.get(name, [unit, unit + 16])
                assert layers[expert].places[f"{experts}.{up}", rows][unit].tolist() == pair
        expected = network(**inputs).logits
        small = remove_units(network, inputs, layers=found)
        assert getattr(small.config, "moe_intermediate_size", small.config.intermediate_size) == 8
        assert experts_of(small)[1].down_proj.shape[columns] == 8
        torch.testing.assert_close(small(**inputs).logits, expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])
        small.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
        assert again.dtype == torch.float64 and torch.equal(again(**inputs).logits, small(**inputs).logits)
        again.float().set_experts_implementation("grouped_mm")
        torch.testing.assert_close(again(**inputs).logits, expected.float(), rtol=1e-4, atol=1e-5)


def as_data(rows):
    return Dataset.from_list(
        [{"input_ids": row.tolist(), "language": "ab"[index % 2]} for index, row in enumerate(rows)]
    )


def search(network, rows, **options):
    def collate(samples):
        return padded([torch.as_tensor(sample["input_ids"]) for sample in samples], "left")

    given = {"route_column": "language", "sparsity": 0.5, "batch_size": 4, "data_collator": collate}
    return find_tickets(network, as_data(rows), **{**given, **options})


@pytest.mark.slow
def test_a_search_keeps_the_neurons_of_each_expert_that_do_most(tmp_path):
    network, rows = build("mixtral"), texts()
    name, module = experts_of(network)
    model = search(network, rows)
    for route in range(2):
        masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[route], strict=True))
        _, read, count = naive_sums(network, rows[route::2])
        for expert in range(4):
            scores = [
                read[expert][unit] / count * math.fsum(w**2 for w in module.down_proj[expert, :, unit].tolist())
                for unit in range(16)
            ]
            best = sorted(sorted(range(16), key=lambda unit: -scores[unit])[:8])
            made, kept = masks[f"{name}.gate_up_proj"][expert], masks[f"{name}.down_proj"][expert]
            assert kept.all(0).nonzero().flatten().tolist() == kept.any(0).nonzero().flatten().tolist() == best
            assert made.all(1).nonzero().flatten().tolist() == [*best, *(unit + 16 for unit in best)]
            assert not made[[unit for unit in range(32) if unit % 16 not in best]].any()
        small = model.extract_ticket(route, small=True)
        assert small.config.intermediate_size == 8
        small.save_pretrained(tmp_path / str(route))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(route), experts_implementation="eager").eval()
        inputs = padded(rows[:3], "left")
        with torch.no_grad():
            expected = model(**inputs, route_ids=route).logits
            torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.mask_bank[0][-1], model.mask_bank[1][-1])
    # Experts that lose different numbers of neurons keep as many as the largest; a refit leaves them as they are.
    uneven = search(build("mixtral"), rows, scope="global", refit=True)
    widest = max(int(expert.any(0).sum()) for expert in uneven.mask_bank[0][-1])
    assert uneven.extract_ticket(0, small=True).config.intermediate_size == 8 * math.ceil(widest / 8)
    by_size = search(build("mixtral"), rows, criterion="magnitude")
    weights = torch.cat([module.gate_up_proj.view(4, 2, 16, 16), module.down_proj.mT[:, None]], 1).detach()
    best = weights.square().sum((1, 3)).argsort(1, descending=True)[:, :8].sort(1).values
    assert [mask.any(0).nonzero().flatten().tolist() for mask in by_size.mask_bank[0][-1]] == best.tolist()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_single_weights_of_experts_are_ranked_within_their_rows(name):
    network, rows = build(name), texts()
    experts, module = experts_of(network)
    model = search(network, rows, granularity="weight")
    masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[1], strict=True))
    x, chosen, shares = given(network, [{"input_ids": row[None]} for row in rows[1::2]])
    for attribute in fused_matrices(module):
        with torch.no_grad():
            parts = expert_inputs(module, attribute, x, chosen, shares).parts
        for expert, part in enumerate(parts):
            norms = [math.sqrt(math.fsum(float(value) ** 2 for value in column)) for column in part.T]
            weight, mask = getattr(module, attribute)[expert], masks[f"{experts}.{attribute}"][expert]
            if module.is_transposed:
                weight, mask = weight.T, mask.T
            for output, row in enumerate(weight.tolist()):
                scores = [abs(value) * norm for value, norm in zip(row, norms, strict=True)]
                best = sorted(range(len(row)), key=lambda i: (-scores[i], i))[: len(row) // 2]
                assert mask[output].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.slow
def test_experts_that_do_not_say_how_they_compute_stay_whole(caplog):
    """Llama 4 multiplies by shares before its experts, and has a class of its own for them."""
    config = Llama4TextConfig(
        **COMMON, intermediate_size=16, intermediate_size_mlp=12, num_local_experts=2, head_dim=8
    )
    network = AutoModelForCausalLM.from_config(config).eval()
    stack = "model.layers.0.feed_forward.experts"
    with caplog.at_level(logging.INFO, "hf_rtl"):
        model = search(network, texts())
    assert f"how the experts compute that hold {stack}.gate_up_proj, {stack}.down_proj" in caplog.text
    masks = dict(zip(model.mask_bank.weight_names, model.mask_bank[0], strict=True))
    assert (
        masks[f"{stack}.down_proj"].all()
        and not masks["model.layers.0.feed_forward.shared_expert.down_proj.weight"].all()
    )
    with pytest.raises(ValueError, match=f"{stack}.gate_up_proj is no weight of .* nor of fused experts that say how"):
        LayerInputs(network, [f"{stack}.gate_up_proj"], lambda *_: None)
    without = RTLModelForCausalLM.from_backbone(
        network, route_names=["a", "b"], ticket_task="labels", prune_exclude=["*shared_expert*"]
    )
    with pytest.raises(ValueError, match="no mask covers what reads .*; it is not known how the experts compute that"):
        find_tickets(without, as_data(texts()), sparsity=0.5, route_column="language")


@pytest.mark.slow
def test_no_trace_is_left_of_the_way_in_which_experts_are_computed():
    network = build("mixtral")
    before = network.config.to_dict()
    find_units(network, {"input_ids": torch.randint(3, 40, (2, 6))})
    assert network.config._experts_implementation == "eager" and network.config.to_dict() == before
