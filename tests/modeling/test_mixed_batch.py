"""Batches whose samples are of several routes."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import ASTConfig, SegformerConfig

from hf_rtl import RTLModelForAudioClassification, RTLModelForSemanticSegmentation, RTLModelForTokenClassification
from hf_rtl.modeling.masking import UNION
from hf_rtl.modeling.mixed_batch import group_by_route, merge_outputs, select_samples
from tests.modeling.naive import (
    KINDS,
    assert_gradients_close,
    close,
    naive_gradients,
    naive_ticket,
    only,
    unite,
    without_labels,
)


ROUTES = [
    [2, 0, 2, 1],  # all of them, one twice
    [1, 1, 1, 1],  # one
    [0, UNION, 0, UNION],  # some, with the union
    ["z", 0, UNION, "x"],  # names among indices
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_sample_alone(zoo, kind):
    model, masks, inputs = zoo(kind)
    model.eval()
    for routes in ROUTES:
        alone = [
            model(**without_labels(only(inputs, [index])), route_ids=route).logits
            for index, route in enumerate(routes)
        ]
        together = model(**inputs, route_ids=routes).logits
        close(together, torch.cat(alone))
        if not any(isinstance(route, str) for route in routes):
            assert torch.equal(model(**inputs, route_ids=torch.tensor(routes)).logits, together)
            assert torch.equal(model(**inputs, route_ids=torch.tensor(routes, dtype=torch.int16)).logits, together)
        tickets = {route: naive_ticket(model, masks[route], route) for route in range(3)}
        tickets[UNION] = naive_ticket(model, unite(masks), UNION)
        for index, route in enumerate(routes):
            expected = tickets[model.route_index(route)](**without_labels(only(inputs, [index])))
            close(together[index : index + 1], expected.logits)


def test_every_field_of_the_output_is_put_back_together(zoo):
    for kind, names in (
        ("vit", {"hidden_states"}),
        ("bert", {"hidden_states"}),
        ("t5", {"decoder_hidden_states"}),
    ):
        model, _, inputs = zoo(kind)
        inputs = without_labels(inputs)
        asked = {"output_hidden_states": True}
        mixed = model.eval()(**inputs, **asked, route_ids=[2, 0, 2, 1])
        assert names <= set(mixed.keys())
        for index, route in enumerate([2, 0, 2, 1]):
            alone = model(**only(inputs, [index]), **asked, route_ids=route)
            for name in mixed:
                if name != "past_key_values" and isinstance(mixed[name], torch.Tensor):
                    close(mixed[name][index : index + 1], alone[name])
                elif isinstance(mixed[name], tuple):
                    assert len(mixed[name]) == len(alone[name])
                    for one, other in zip(mixed[name], alone[name], strict=True):
                        close(one[index : index + 1], other)
        as_tuple = model(**inputs, **asked, route_ids=[2, 0, 2, 1], return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], mixed[0])


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_each_group_of_a_mixed_batch_is_as_if_alone(zoo, kind):
    model, masks, inputs = zoo(kind)
    model.train()
    routes, groups = [2, 0, 2, 0], {0: [1, 3], 2: [0, 2]}
    weights = {route: number_of_terms(kind, only(inputs, group)["labels"]) for route, group in groups.items()}
    expected, loss, statistics = None, 0, {}
    for route, group in groups.items():
        share = weights[route] / sum(weights.values())
        output, gradients = naive_gradients(model, masks[route], only(inputs, group), route, share)
        loss += output.loss * share
        if expected is None:
            expected = gradients
        else:
            expected = {name: None if g is None else g + gradients[name] for name, g in expected.items()}
        with copy.deepcopy(model).route_context(route) as alone:
            close(alone(**only(inputs, group)).logits, output.logits)
            if alone.norm_statistics is not None:
                statistics[route] = [rows[route] for rows in alone.norm_statistics.rows]
    mixed = model(**inputs, route_ids=routes)
    mixed.loss.backward()
    tolerance = LOSS_TOLERANCE.get(kind, 1e-12)
    close(mixed.loss, loss, tolerance)
    assert_gradients_close(model, expected, [masks[0], masks[2]], rtol=max(tolerance, 1e-9), atol=tolerance)
    assert model.routes_since_update == {0, 2}
    for route, rows in statistics.items():
        for one, other in zip(model.norm_statistics.rows, rows, strict=True):
            assert torch.equal(one[route], other)


# transformers computes the loss of causal language models in float32.
LOSS_TOLERANCE = {"gpt2": 1e-6}


def number_of_terms(kind, labels):
    """How many terms the mean loss over these labels has."""
    if kind == "gpt2":
        labels = labels[:, 1:]
    return (labels != -100).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_mixed_batch_is_the_mean_over_all_its_samples_or_tokens(zoo, kind):
    """It equals the loss of the whole batch's logits."""
    model, _, inputs = zoo(kind)
    output = model.eval()(**inputs, route_ids=[2, 0, 2, 1])
    logits, labels = output.logits, inputs["labels"]
    if kind == "gpt2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
    close(output.loss.double(), loss, LOSS_TOLERANCE.get(kind, 1e-12))


def test_a_group_without_labelled_tokens_has_no_part_in_the_loss(zoo):
    model, _, inputs = zoo("bert")
    inputs["labels"][1] = -100
    output = model.eval()(**inputs, route_ids=[2, 0, 2, 1])
    assert model(**only(inputs, [1]), route_ids=0).loss.isnan()
    close(output.loss, F.cross_entropy(output.logits.flatten(0, -2), inputs["labels"].flatten()))
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters() if p.grad is not None)


def test_pixels_weigh_in_segmentation(fill_masks):
    config = SegformerConfig(
        hidden_sizes=[8, 8],
        num_encoder_blocks=2,
        depths=[1, 1],
        num_attention_heads=[1, 1],
        sr_ratios=[1, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        num_labels=3,
        semantic_loss_ignore_index=255,
    )
    model = RTLModelForSemanticSegmentation.from_backbone(config, route_names=["x", "y"], ticket_task="labels", seed=0)
    fill_masks(model)
    model.double().eval()
    labels = torch.randint(0, 3, (3, 16, 16))
    labels[0, 3:] = 255
    labels[1, :, 9:] = 255
    output = model(pixel_values=torch.randn(3, 3, 16, 16).double(), labels=labels, route_ids=[1, 0, 1])
    upsampled = F.interpolate(output.logits, size=(16, 16), mode="bilinear", align_corners=False)
    close(output.loss, F.cross_entropy(upsampled, labels, ignore_index=255))


def test_token_and_audio_classes(tiny_bert_config, fill_masks):
    model = RTLModelForTokenClassification.from_backbone(
        tiny_bert_config, route_names=["x", "y"], ticket_task="labels", seed=0
    )
    fill_masks(model)
    labels = torch.randint(0, 3, (3, 6))
    labels[0, 2:] = -100
    output = model.double().eval()(input_ids=torch.randint(0, 40, (3, 6)), labels=labels, route_ids=["y", "x", "x"])
    close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))

    config = ASTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=4,
    )
    model = RTLModelForAudioClassification.from_backbone(config, route_names=["x", "y"], ticket_task="labels", seed=0)
    masks = fill_masks(model)
    x, labels = torch.randn(3, 32, 16).double(), torch.tensor([0, 3, 1])
    output = model.double().eval()(x, labels=labels, route_ids=[1, 0, 1])
    close(output.loss, F.cross_entropy(output.logits, labels))
    close(output.logits[1:2], naive_ticket(model, masks[0])(x[1:2]).logits)


def test_outputs_that_are_not_batch_first_are_refused(zoo):
    model, _, inputs = zoo("gpt2")
    inputs = without_labels(inputs)
    mixed = model.eval()(**inputs, route_ids=[0, 1, 0, 1])
    assert set(mixed.keys()) == {"logits"}  # the cache, which is on by default, is left out
    with pytest.raises(ValueError, match="`(past_key_values|cache)` is not batch-first.*use_cache=False"):
        model(**inputs, route_ids=[0, 1, 0, 1], use_cache=True)
    assert "past_key_values" in model(**inputs, route_ids=1)


def test_inputs_that_are_not_batch_first_are_refused(zoo):
    model, _, inputs = zoo("bert")
    inputs = without_labels(inputs)
    shared = torch.arange(7)[None]
    together = model.eval()(**inputs, position_ids=shared, route_ids=[2, 0, 2, 1])  # one row is for every sample
    close(together.logits, model(**inputs, route_ids=[2, 0, 2, 1]).logits)
    with pytest.raises(ValueError, match="`position_ids` has 2 rows for a batch of 4"):
        model(**inputs, position_ids=shared.repeat(2, 1), route_ids=[2, 0, 2, 1])


def test_grouping_selecting_and_merging():
    groups = group_by_route([2, 0, 2, 5, 0, 2], torch.device("cpu"))
    assert groups[0].tolist() == [1, 4] and groups[2].tolist() == [0, 2, 5] and groups[5] == slice(3, 4)
    assert list(groups) == [0, 2, 5]
    inputs = {"x": torch.arange(12).view(6, 2), "one": torch.ones(1, 3), "scalar": torch.tensor(3.0), "flag": True}
    selected = select_samples(inputs, groups[2], 6)
    assert selected["x"].tolist() == [[0, 1], [4, 5], [10, 11]]
    assert all(selected[name] is inputs[name] for name in ("one", "scalar", "flag"))
    single = select_samples({"x": torch.tensor([[7]])}, torch.tensor([0]), 1)
    assert single["x"].tolist() == [[7]]
    x = torch.randn(6, 2)
    outputs = [
        {"loss": torch.tensor(float(route)), "logits": x[positions], "states": (x[positions] * 2, [x[positions] * 3])}
        for route, positions in groups.items()
    ]
    sizes = [torch.tensor(size) for size in (2, 3, 1)]
    merged = merge_outputs(outputs, list(groups.values()), sizes)
    assert torch.equal(merged["logits"], x)
    assert torch.equal(merged["states"][0], x * 2) and torch.equal(merged["states"][1][0], x * 3)
    assert merged["loss"].item() == pytest.approx((0 * 2 + 2 * 3 + 5 * 1) / 6)
    for bad in (torch.tensor(1.0), torch.zeros(7, 1), "text", None):
        with pytest.raises(ValueError, match="`states` is not batch-first"):
            merge_outputs([{**o, "states": bad} for o in outputs], list(groups.values()), sizes)


@pytest.mark.parametrize("route_ids", [[0, 0, 0, 1, 2, 2], [2, 2, 0, 0, 0, 1]])
def test_a_batch_in_the_order_of_routes_is_not_copied(route_ids):
    x = torch.randn(6, 2)
    groups = group_by_route(route_ids, torch.device("cpu"))
    parts = [select_samples({"x": x}, positions, 6)["x"] for positions in groups.values()]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)
    assert [route_ids[positions.start] for positions in groups.values()] == [0, 1, 2]
    merged = merge_outputs([{"x": part} for part in parts], list(groups.values()), [])
    assert torch.equal(merged["x"], x)


def test_a_single_sample_under_batch_norm_in_training_is_refused(zoo):
    model, _, inputs = zoo("resnet")
    before = [rows.clone() for rows in model.norm_statistics.rows]
    with pytest.raises(ValueError, match="single sample"):
        model.train()(**inputs, route_ids=[0, 0, 1, 0])
    assert all(torch.equal(rows, old) for rows, old in zip(model.norm_statistics.rows, before, strict=True))
    model.eval()(**inputs, route_ids=[0, 0, 1, 0])
