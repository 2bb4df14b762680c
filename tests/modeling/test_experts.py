"""Fused experts under masks, against the naive reference."""

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig

from hf_rtl import RTLModelForSequenceClassification
from hf_rtl.modeling.experts import is_stack
from tests.modeling.naive import (
    BATCH,
    assert_gradients_close,
    close,
    naive_gradients,
    naive_ticket,
    only,
    without_labels,
)


CONFIG = Qwen2MoeConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4, vocab_size=40,
    moe_intermediate_size=8, shared_expert_intermediate_size=8, pad_token_id=0, num_labels=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "implementation, dtype, tolerance",
    [
        ("eager", torch.float64, 1e-9),
        ("batched_mm", torch.float64, 1e-9),
        ("grouped_mm", torch.float32, 1e-5),
    ],
)
def test_masked_experts(fill_masks, implementation, dtype, tolerance, tmp_path):
    model = RTLModelForSequenceClassification.from_backbone(
        CONFIG, route_names=["x", "y"], ticket_task="labels", seed=0
    )
    model.backbone.set_experts_implementation(implementation)
    model, masks = model.to(dtype).eval(), fill_masks(model)
    inputs = {"input_ids": torch.randint(2, 20, (BATCH, 7)), "labels": torch.arange(BATCH) % 3}
    expected, gradients = naive_gradients(model, masks[1], inputs)
    output = model(**inputs, route_ids=1)
    output.loss.backward()
    close(output.logits, expected.logits, tolerance)
    assert_gradients_close(model, gradients, [masks[1]], tolerance, tolerance)

    given, routes = without_labels(inputs), [1, 0, 1, 1]
    with torch.no_grad():
        mixed = model(**given, route_ids=routes).logits
        for route in (0, 1):
            positions = [index for index, each in enumerate(routes) if each == route]
            close(mixed[positions], naive_ticket(model, masks[route])(**only(given, positions)).logits, tolerance)
        ticket = model.extract_ticket(0)
        assert torch.equal(ticket(**given).logits, model(**given, route_ids=0).logits)
    ticket.save_pretrained(tmp_path)
    again = type(ticket).from_pretrained(tmp_path, experts_implementation=implementation, dtype=dtype)
    assert torch.equal(again(**given).logits, ticket(**given).logits)


def test_state_matrices_are_no_experts():
    """Those of Mamba layers are exponents: a zero there is no zero of the layer."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log, self.weights = (nn.Parameter(torch.randn(2, 4, 3)) for _ in range(2))

    assert [is_stack("mixer", Mixer(), name) for name in ("A_log", "weights")] == [False, True]
