"""Routers against naive references: their evidence, their decisions, and their use in a model."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Wav2Vec2Config

from hf_rtl import (
    RTLModel,
    RTLModelForAudioClassification,
    RTLModelForSeq2SeqLM,
    RTLModelForSequenceClassification,
    RTLModelForTokenClassification,
)
from hf_rtl.modeling.routers import CentroidRouter, EntropyRouter, ScoreRouter
from hf_rtl.training.router_fitting import sample_evidence
from tests.modeling.random_routers import randomised


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_statistics(model: RTLModel) -> RTLModel:
    """The model in evaluation mode, after every ticket and the union have seen other images."""
    for route in range(-1, model.num_routes):
        with torch.no_grad(), model.route_context(route):
            model.train()(pixel_values=torch.randn(8, 3, 32, 32) + route)
    return model.eval()


@pytest.fixture
def model(tiny_labels_model) -> RTLModel:
    return with_statistics(tiny_labels_model)


@pytest.fixture
def members(tiny_membership_model) -> RTLModel:
    return with_statistics(tiny_membership_model)


# Evidence


def test_score_evidence_is_each_tickets_own(model: RTLModel, members: RTLModel) -> None:
    evidence = ScoreRouter(3).evidence(model, {"pixel_values": IMAGES})
    for route in range(3):
        logits = model.extract_ticket(route).eval()(pixel_values=IMAGES).logits.double()
        for sample in range(6):
            expected = math.log(sum(math.exp(value) for value in logits[sample].tolist()))
            assert evidence[sample, route].item() == pytest.approx(expected, rel=1e-5)
    evidence = ScoreRouter(3).evidence(members, {"pixel_values": IMAGES})
    assert torch.allclose(evidence, members(pixel_values=IMAGES).logits)


def test_centroid_evidence_is_linear_in_the_unions_features(model: RTLModel) -> None:
    union = model.extract_ticket(-1).eval().timm_model
    features = union.forward_head(union.forward_features(IMAGES), pre_logits=True).double()
    router = randomised(CentroidRouter(3, features.shape[1]))
    evidence = router.evidence(model, {"pixel_values": IMAGES})
    for sample in range(6):
        for route in range(3):
            products = (features[sample] * router.directions[route].double()).tolist()
            expected = sum(products) + router.bias[route].item()
            assert evidence[sample, route].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_features_of_text_are_what_the_head_is_given(tiny_bert_config) -> None:
    model = RTLModelForSequenceClassification.from_backbone(
        tiny_bert_config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    ids = torch.randint(1, 40, (4, 9))
    router = randomised(CentroidRouter(2, 16))
    evidence = router.evidence(model, {"input_ids": ids})
    pooled = model.backbone.bert(ids).pooler_output
    assert torch.allclose(evidence, pooled @ router.directions.T + router.bias, rtol=1e-4, atol=1e-5)


def test_features_of_tokens_are_averaged_without_padding(tiny_bert_config) -> None:
    model = RTLModelForTokenClassification.from_backbone(
        tiny_bert_config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    router = randomised(CentroidRouter(2, 16))
    ids = torch.randint(1, 40, (3, 6))
    padded, mask = nn.functional.pad(ids, (0, 4)), nn.functional.pad(torch.ones_like(ids), (0, 4))
    alone = router.evidence(model, {"input_ids": ids})
    assert torch.allclose(
        router.evidence(model, {"input_ids": padded, "attention_mask": mask}), alone, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(router.evidence(model, {"input_ids": padded}), alone, rtol=1e-2)


@pytest.mark.parametrize("num_positions", [8, 9])  # the decoder's number of positions, and another one
def test_features_of_encoder_decoder_models_are_those_of_the_encoder(tiny_t5_config, num_positions: int) -> None:
    model = RTLModelForSeq2SeqLM.from_backbone(
        tiny_t5_config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    router = randomised(CentroidRouter(2, 16))
    ids, answers = torch.randint(1, 40, (3, 6)), torch.randint(1, 40, (3, 8))
    encoded = model.backbone.encoder(ids).last_hidden_state.mean(1)
    expected = (encoded @ router.directions.T + router.bias).tolist()
    size = num_positions - 6
    padded, mask = nn.functional.pad(ids, (0, size)), nn.functional.pad(torch.ones_like(ids), (0, size))
    inputs = {"input_ids": padded, "attention_mask": mask, "decoder_input_ids": answers}
    assert router.evidence(model, inputs).tolist() == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected]
    model.set_router(router)
    # The decoder sees only the answer, which the router must not use.
    output = model(input_ids=padded, attention_mask=mask, labels=answers)
    assert torch.equal(output.route_ids, router.decide(torch.tensor(expected)).route_ids)


def test_features_of_audio_are_those_that_the_head_has_averaged() -> None:
    """Only the head knows which positions are padding: the mask has an entry per sample of the waveform."""
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
    )
    model = RTLModelForAudioClassification.from_backbone(
        config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    router = randomised(CentroidRouter(2, 8))
    waves, mask = torch.randn(2, 400), torch.ones(2, 400, dtype=torch.long)
    hidden = model.backbone.projector(model.backbone.wav2vec2(waves, attention_mask=mask).last_hidden_state).mean(1)
    expected = hidden @ router.directions.T + router.bias
    padded = {"input_values": nn.functional.pad(waves, (0, 300)), "attention_mask": nn.functional.pad(mask, (0, 300))}
    assert torch.allclose(router.evidence(model, padded), expected, rtol=1e-4, atol=1e-5)


def test_evidence_of_each_sample_is_that_of_the_sample_alone(tiny_bert_config, fill_masks) -> None:
    model = RTLModelForSequenceClassification.from_backbone(
        tiny_bert_config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    fill_masks(model)
    ids, shared = torch.randint(1, 40, (4, 5)), {"position_ids": torch.arange(5)[None], "output_attentions": True}
    evidence = sample_evidence(EntropyRouter(2), model, {"input_ids": ids, **shared})
    for index in range(4):
        alone = EntropyRouter(2).evidence(model, {"input_ids": ids[index : index + 1], **shared})
        assert torch.equal(evidence[index], alone[0])
    assert len(set(evidence[:, 0].tolist())) == 4


def test_entropy_evidence_is_the_derivative_by_the_coefficients(tiny_attention_config) -> None:
    plain = AutoModelForSequenceClassification.from_config(tiny_attention_config).double()
    model = RTLModelForSequenceClassification.from_backbone(
        plain, route_names=["a", "b", "c"], ticket_task="labels"
    ).eval()
    generator = torch.Generator().manual_seed(3)
    masks = [[torch.rand(shape, generator=generator) < 0.5 for shape in model.mask_bank.shapes] for _ in range(3)]
    for route, mask in enumerate(masks):
        model.mask_bank[route] = mask
    ids = torch.randint(0, 20, (5, 7))
    with torch.inference_mode():  # as in a pipeline
        evidence = EntropyRouter(3).evidence(model, {"input_ids": ids})

    reference = AutoModelForSequenceClassification.from_config(tiny_attention_config).double().eval()

    def entropy(coefficients: list[float]) -> float:
        reference.load_state_dict(model.backbone.state_dict())
        for index, name in enumerate(model.mask_bank.weight_names):
            mixed = sum(c * mask[index].double() for c, mask in zip(coefficients, masks, strict=True))
            reference.get_parameter(name).data.mul_(mixed)
        probabilities = reference(ids).logits.softmax(1).tolist()
        return sum(-p * math.log(p) for row in probabilities for p in row) / len(ids)

    assert evidence.shape == (5, 3) and (evidence == evidence[0]).all()
    for route in range(3):
        higher, lower = [1 / 3] * 3, [1 / 3] * 3
        higher[route] += 1e-5
        lower[route] -= 1e-5
        slope = (entropy(higher) - entropy(lower)) / 2e-5
        assert evidence[0, route].item() == pytest.approx(-slope, rel=1e-4, abs=1e-8)
    # Weights and masks are as they were, and no gradient is left.
    assert all(p.grad is None for p in model.parameters()) and model.active.route is None
    assert torch.equal(model(input_ids=ids, route_ids=1).logits, model.extract_ticket(1).eval()(ids).logits)


# Decisions


def test_decisions_are_the_largest_of_scaled_evidence() -> None:
    router = ScoreRouter(3)
    router.scale.copy_(torch.tensor([1.0, 2.0, 0.5]))
    router.offset.copy_(torch.tensor([0.0, -1.0, 0.25]))
    rows = [[1.0, 1.0, 1.0], [0.0, 1.5, 3.0], [-2.0, -2.0, -2.0]]
    decision = router.decide(torch.tensor(rows))
    for sample, row in enumerate(rows):
        scaled = [row[0], 2 * row[1] - 1, 0.5 * row[2] + 0.25]
        total = sum(math.exp(value) for value in scaled)
        expected = [math.exp(value) / total for value in scaled]
        assert decision.route_scores[sample].exp().tolist() == pytest.approx(expected, rel=1e-5)
        assert decision.confidence[sample].item() == pytest.approx(max(expected), rel=1e-5)
        assert decision.route_ids[sample].item() == expected.index(max(expected))
    assert decision.route_ids.tolist() == [0, 1, 2]


def test_doubtful_samples_take_the_fallback(model: RTLModel) -> None:
    router = randomised(ScoreRouter(3))
    sure = router.decide(router.evidence(model, {"pixel_values": IMAGES}))
    middle = sure.confidence.sort().values[2:4].mean().item()
    for fallback, index in ((-1, -1), ("dusk", 1)):
        model.set_router(router, threshold=middle, fallback=fallback)
        output = model(pixel_values=IMAGES)
        doubtful = sure.confidence < middle
        assert doubtful.sum() == 3
        assert output.route_ids.tolist() == torch.where(doubtful, index, sure.route_ids).tolist()
        expected = model(pixel_values=IMAGES, route_ids=output.route_ids).logits
        assert torch.allclose(output.logits, expected, rtol=1e-5)


# Use in a model


@pytest.mark.parametrize("kind", ["score", "centroid", "entropy"])
def test_a_call_without_route_ids_takes_the_routers_routes(model: RTLModel, kind: str) -> None:
    features = model.backbone.timm_model.num_features
    router = {"score": ScoreRouter(3), "centroid": CentroidRouter(3, features), "entropy": EntropyRouter(3)}[kind]
    model.set_router(randomised(router))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    decision = model.infer_routes(pixel_values=IMAGES)
    output = model(pixel_values=IMAGES, labels=labels)
    expected = model(pixel_values=IMAGES, labels=labels, route_ids=decision.route_ids)
    assert torch.equal(output.route_ids, decision.route_ids)
    assert torch.equal(output.route_scores, decision.route_scores)
    assert torch.allclose(output.logits, expected.logits) and torch.allclose(output.loss, expected.loss)
    # Routers must not use labels.
    other = model(pixel_values=IMAGES, labels=labels.flip(0))
    assert torch.equal(other.route_scores, output.route_scores)
    # A call with given routes returns no other routes.
    assert "route_ids" not in expected


@pytest.mark.parametrize("kind", ["score", "centroid"])
def test_decisions_do_not_depend_on_the_batch(model: RTLModel, kind: str) -> None:
    router = ScoreRouter(3) if kind == "score" else CentroidRouter(3, model.backbone.timm_model.num_features)
    model.set_router(randomised(router))
    whole = model.infer_routes(pixel_values=IMAGES)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = model.infer_routes(pixel_values=IMAGES[order])
    alone = [model.infer_routes(pixel_values=image[None]) for image in IMAGES]
    assert torch.equal(shuffled.route_ids, whole.route_ids[order])
    assert torch.equal(torch.cat([decision.route_ids for decision in alone]), whole.route_ids)
    scores = torch.cat([decision.route_scores for decision in alone])
    assert torch.allclose(scores, whole.route_scores, rtol=1e-5, atol=1e-6)


def test_membership_tickets_all_answer_whatever_the_router(members: RTLModel) -> None:
    before = members(pixel_values=IMAGES)
    assert "route_ids" not in before
    members.set_router(randomised(ScoreRouter(3)))
    output = members(pixel_values=IMAGES, labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(output.logits, before.logits)
    assert torch.equal(output.route_ids, members.infer_routes(pixel_values=IMAGES).route_ids)
    members.set_router(randomised(CentroidRouter(3, members.backbone.timm_model.num_features)))
    output = members(pixel_values=IMAGES)
    assert torch.equal(output.logits, before.logits)
    assert torch.equal(output.route_scores, members.infer_routes(pixel_values=IMAGES).route_scores)


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", ["score", "centroid", "entropy"])
def test_routers_are_saved_with_the_model(model: RTLModel, kind: str, compact: bool, tmp_path) -> None:
    features = model.backbone.timm_model.num_features
    router = {"score": ScoreRouter(3), "centroid": CentroidRouter(3, features), "entropy": EntropyRouter(3)}[kind]
    model.set_router(randomised(router), threshold=0.4, fallback="night")
    before = model.infer_routes(pixel_values=IMAGES)
    model.save_pretrained(tmp_path, compact=compact)
    loaded = RTLModel.from_pretrained(tmp_path).eval()
    assert type(loaded.router) is type(router)
    for own, other in zip(before, loaded.infer_routes(pixel_values=IMAGES), strict=True):
        assert torch.equal(own, other)
    size = (tmp_path / "model.safetensors").stat().st_size
    footprint = model.footprint()["compact_bytes" if compact else "full_bytes"]
    assert 0 <= size - footprint < 20_000  # the header
    model.set_router(None)
    assert footprint - model.footprint()["compact_bytes" if compact else "full_bytes"] == sum(
        tensor.nbytes for tensor in router.buffers()
    )


def test_routers_stay_in_float32(model: RTLModel, tmp_path) -> None:
    router = randomised(ScoreRouter(3))
    scale, offset = router.scale.clone(), router.offset.clone()
    model.set_router(router)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for kept in (model, RTLModel.from_pretrained(tmp_path), RTLModel.from_pretrained(tmp_path, dtype=torch.float16)):
        assert kept.router.scale.dtype == torch.float32
        assert torch.equal(kept.router.scale, scale) and torch.equal(kept.router.offset, offset)


# Other routes


def test_a_router_follows_when_a_route_is_dropped(model: RTLModel) -> None:
    model.set_router(randomised(ScoreRouter(3)))
    before = model.infer_routes(pixel_values=IMAGES).route_scores
    model.drop_route("dusk")
    expected = before[:, [0, 2]].log_softmax(1)
    assert torch.allclose(model.infer_routes(pixel_values=IMAGES).route_scores, expected, rtol=1e-4, atol=1e-6)


def test_the_fallback_route_cannot_be_dropped(model: RTLModel) -> None:
    model.set_router(randomised(ScoreRouter(3)), threshold=0.5, fallback="dusk")
    with pytest.raises(ValueError, match="router_fallback.*'day', 'night', got 'dusk'"):
        model.drop_route("dusk")
    assert model.route_names == ["day", "dusk", "night"] and model.router.num_routes == 3


def test_a_new_ticket_takes_the_router_out(model: RTLModel, caplog) -> None:
    model.set_router(randomised(ScoreRouter(3)), threshold=0.5, fallback="dusk")
    with caplog.at_level(logging.WARNING):
        model.append_ticket("dawn", model.mask_bank["day"], statistics=[r[0] for r in model.norm_statistics.rows])
    assert "does not know the new route 'dawn'" in caplog.text
    assert model.router is None and model.config.router == "given" and model.config.router_threshold == 0
    with pytest.raises(ValueError, match="no router was fitted"):
        model(pixel_values=IMAGES)


# Refused arguments


def test_bad_routers_are_refused(model: RTLModel, members: RTLModel, tiny_bert_config) -> None:
    with pytest.raises(ValueError, match="fitted for 4 routes, and this model has 3: 'day', 'dusk', 'night'"):
        model.set_router(ScoreRouter(4))
    with pytest.raises(ValueError, match=r"`router_threshold` must be a probability in \[0, 1\], got 1.5"):
        model.set_router(ScoreRouter(3), threshold=1.5)
    with pytest.raises(ValueError, match="'noon'"):
        model.set_router(ScoreRouter(3), fallback="noon")
    with pytest.raises(ValueError, match="'entropy' compares outputs over several labels"):
        members.set_router(EntropyRouter(3))
    with pytest.raises(TypeError, match="`router` must be a fitted Router or None, got 'score'"):
        model.set_router("score")
    for unchanged in (model, members):
        assert unchanged.router is None and unchanged.config.router == "given"
    model.set_router(CentroidRouter(3, 5))
    with pytest.raises(ValueError, match="fitted for another backbone: it knows 5 features, and there are 96"):
        model(pixel_values=IMAGES)
    headless = RTLModel.from_backbone("test_resnet", route_names=["a", "b"], ticket_task="labels").eval()
    headless.set_router(ScoreRouter(2))
    with pytest.raises(ValueError, match="one prediction per sample.*got none"):
        headless(pixel_values=IMAGES)
    tokens = RTLModelForTokenClassification.from_backbone(
        tiny_bert_config, route_names=["a", "b"], ticket_task="labels", seed=0
    ).eval()
    for router in (ScoreRouter(2), EntropyRouter(2)):
        tokens.set_router(router)
        with pytest.raises(ValueError, match=r"one prediction per sample.*got \(1, 5, 3\)"):
            tokens(input_ids=torch.ones(1, 5, dtype=torch.long))


def test_no_router_decides_in_training_or_without_samples(model: RTLModel) -> None:
    model.set_router(randomised(ScoreRouter(3)))
    with pytest.raises(ValueError, match=r"the batch has no samples: its first tensor has the shape \(0, 3, 32, 32\)"):
        model(pixel_values=IMAGES[:0])
    with pytest.raises(ValueError, match="the batch has no samples"):
        model.infer_routes(pixel_values=IMAGES[:0])
    model.train()
    rows = [row.clone() for row in model.norm_statistics.rows]
    with pytest.raises(ValueError, match="evaluation mode only"):
        model(pixel_values=IMAGES)
    assert all(torch.equal(*pair) for pair in zip(rows, model.norm_statistics.rows, strict=True))


def test_a_router_of_other_routes_in_a_file_is_refused(model: RTLModel, tmp_path) -> None:
    model.set_router(ScoreRouter(3))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"router.scale": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="wrong sizes.*router"):
        RTLModel.from_pretrained(tmp_path)


def test_a_configuration_that_names_another_router_is_not_saved(model: RTLModel, tmp_path) -> None:
    model.config.router = "score"
    with pytest.raises(ValueError, match="`config.router` is 'score', but the model's router is 'given'"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
