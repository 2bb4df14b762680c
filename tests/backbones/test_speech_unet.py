"""The speech U-Net: its shapes and counts, its loss against a naive reference, and as the backbone of tickets."""

from __future__ import annotations

import cmath
import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_rtl import RTLModel
from hf_rtl.backbones import SpeechUNet, SpeechUNetConfig
from hf_rtl.backbones.speech_unet import weighted_sdr_loss


SMALL = {"channels": [3, 4], "window_length": 64, "hop_length": 16}


def small_model(seed: int = 0) -> SpeechUNet:
    torch.manual_seed(seed)
    return SpeechUNet(SpeechUNetConfig(**SMALL))


def routed(fill_masks, norm_statistics: str = "per_route") -> RTLModel:
    """A model of three routes with masks and, with `per_route` statistics, a different row for each route."""
    model = RTLModel.from_backbone(
        SpeechUNetConfig(**SMALL),
        route_names=["room", "street", "train"],
        ticket_task="labels",
        seed=0,
        norm_statistics=norm_statistics,
    )
    fill_masks(model)
    for route in range(3):
        model.train()(input_values=(route + 1) * torch.randn(2, 300), route_ids=route)
    return model.eval()


# The network


def test_prunable_weights_are_those_that_the_paper_counts():
    model = RTLModel.from_backbone(SpeechUNetConfig(), route_names=["a"], ticket_task="labels", seed=0)
    shapes = dict(zip(model.mask_bank.weight_names, model.mask_bank.shapes, strict=True))
    # Encoder, then decoder from inside out; transposed convolutions are [in, out, time, frequency].
    assert [tuple(shapes[f"encoder.{i}.0.weight"]) for i in range(5)] == [
        *((12, 2, 3, 5), (12, 12, 3, 3), (12, 12, 3, 3), (24, 12, 3, 3), (48, 24, 3, 3))
    ]
    assert [tuple(shapes[f"decoder.{i}.0.weight"]) for i in range(4, -1, -1)] == [
        *((48, 24, 3, 3), (48, 12, 3, 3), (24, 12, 3, 3), (24, 12, 3, 3), (24, 2, 3, 5))
    ]
    assert len(shapes) == 10 and model.mask_bank.num_weights == 37_368
    # Three models of the paper's table, in thousands.
    assert [round(3 * 37.368 * density, 1) for density in (0.75, 0.5, 0.25)] == [84.1, 56.1, 28.0]


def test_only_frequencies_are_halved():
    model, shapes = SpeechUNet(SpeechUNetConfig()).eval(), []
    for layer in [*model.encoder, *model.decoder[::-1]]:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[2:])))
    model(torch.randn(1, 4 * 256))
    halves = [257, 129, 65, 33, 17]
    assert shapes == [(5, size) for size in [*halves, 33, 65, 129, 257, 513]]


@pytest.mark.parametrize("num_samples", [1, 63, 64, 300, 1001])
def test_output_is_as_long_as_the_input(num_samples):
    noisy = torch.randn(2, num_samples)
    output = small_model().eval()(noisy, labels=noisy)
    assert output.logits.shape == noisy.shape and output.logits.isfinite().all() and output.loss.ndim == 0


def test_a_constant_mask_scales_the_waveform():
    """The transform and its inverse lose nothing, and the mask's magnitude is bounded by tanh."""
    model, noisy = small_model().eval(), torch.randn(2, 1001)
    last = model.decoder[0][0]
    for bias, factor in (((30.0, 0.0), 1.0), ((-0.5, 0.0), -math.tanh(0.5))):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor(bias))
        assert torch.allclose(model(noisy).logits, factor * noisy, atol=1e-5)
    with torch.no_grad():
        last.bias.zero_()
    assert model(noisy).logits.abs().max() < 1e-5
    for labels in (noisy, torch.randn(2, 1001)):
        model(noisy, labels=labels).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mask", [30j, 0.3 + 0.4j, -0.6 + 0.2j])
def test_the_mask_is_complex(mask):
    """Channels are its real and its imaginary part: its phase turns the waveform's, and tanh bounds its magnitude."""
    model = small_model().eval()
    last = model.decoder[0][0]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([mask.real, mask.imag]))
    angles = 2 * math.pi * 8 * torch.arange(640) / 64
    expected = math.tanh(abs(mask)) * torch.cos(angles + cmath.phase(mask))
    found = model(torch.cos(angles)[None]).logits[0]
    assert torch.allclose(found[100:500], expected[100:500], atol=1e-3)


def test_loudness_does_not_matter():
    model, noisy = small_model().eval(), torch.randn(2, 500)
    expected = model(noisy).logits
    louder = noisy * torch.tensor([[100.0], [0.01]])
    assert torch.allclose(model(louder).logits / louder * noisy, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window_length": 100}, "`window_length` must be a multiple of 8 for 2 layers"),
        ({"hop_length": 33}, "`hop_length` must be from 1 to half of `window_length` = 64, got 33"),
        ({"channels": []}, "`channels` must be positive numbers"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        SpeechUNetConfig(**{**SMALL, **changed})


def test_waveforms_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be waveforms \[batch, samples\], got \[300\]"):
        small_model()(torch.randn(300))
    with pytest.raises(ValueError, match=r"got \[2, 300\] and \[2, 299\]"):
        small_model()(torch.randn(2, 300), labels=torch.randn(2, 299))


# The loss


def naive_weighted_sdr(enhanced: np.ndarray, clean: np.ndarray, noisy: np.ndarray) -> float:
    """Choi et al. 2019, sample by sample in float64."""

    def sdr(target: list[float], estimate: list[float]) -> float:
        inner = sum(t * e for t, e in zip(target, estimate, strict=True))
        return -inner / math.sqrt(sum(t * t for t in target)) / math.sqrt(sum(e * e for e in estimate))

    losses = []
    for e, c, n in zip(enhanced.tolist(), clean.tolist(), noisy.tolist(), strict=True):
        noise, removed = [y - x for x, y in zip(c, n, strict=True)], [y - x for x, y in zip(e, n, strict=True)]
        speech_energy, noise_energy = sum(x * x for x in c), sum(x * x for x in noise)
        alpha = speech_energy / (speech_energy + noise_energy)
        losses.append(alpha * sdr(c, e) + (1 - alpha) * sdr(noise, removed))
    return sum(losses) / len(losses)


def test_loss_is_that_of_a_naive_reference():
    generator = np.random.default_rng(0)
    enhanced, clean, noise = generator.normal(size=(3, 4, 50)) * [[[1.0]], [[2.0]], [[0.7]]]
    tensors = [torch.from_numpy(array) for array in (enhanced, clean, clean + noise)]
    assert float(weighted_sdr_loss(*tensors)) == pytest.approx(
        naive_weighted_sdr(enhanced, clean, clean + noise), abs=1e-12
    )
    model = small_model().eval()
    noisy, labels = tensors[2].float(), tensors[1].float()
    output = model(noisy, labels=labels)
    expected = naive_weighted_sdr(output.logits.detach().numpy(), clean, clean + noise)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)


def test_loss_of_known_answers():
    clean, noise = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])
    noisy = clean + noise
    assert float(weighted_sdr_loss(clean, clean, noisy)) == pytest.approx(-1)
    # Without noise, everything has the wrong sign.
    assert float(weighted_sdr_loss(-clean, clean, clean)) == pytest.approx(1)
    # Nothing is removed: the cosine of speech and mixture is 3/5, weighted by 9/25; silence has no cosine.
    assert float(weighted_sdr_loss(noisy, clean, noisy)) == pytest.approx(-9 / 25 * 3 / 5)
    # All is removed: the cosine of noise and mixture is 4/5, weighted by 16/25.
    assert float(weighted_sdr_loss(torch.zeros(1, 3), clean, noisy)) == pytest.approx(-16 / 25 * 4 / 5)


# As a transformers model, and as a backbone


def test_the_libraries_know_it(tmp_path):
    config = AutoConfig.for_model("speech_unet", **SMALL)
    assert isinstance(config, SpeechUNetConfig) and isinstance(AutoModel.from_config(config), SpeechUNet)
    model, noisy = small_model().eval(), torch.randn(2, 300)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.channels == [3, 4] and torch.equal(loaded(noisy).logits, model(noisy).logits)


@pytest.mark.parametrize("norm_statistics", ["per_route", "shared"])
def test_save_and_load_are_exact(tmp_path, fill_masks, norm_statistics):
    model = routed(fill_masks, norm_statistics)
    model.save_pretrained(tmp_path)
    loaded = RTLModel.from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    noisy = torch.randn(4, 301)
    outputs = [model(input_values=noisy, route_ids=route).logits for route in (0, 1, 2, -1)]
    for route, expected in zip((0, 1, 2, -1), outputs, strict=True):
        assert torch.equal(loaded(input_values=noisy, route_ids=route).logits, expected)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("route", [0, "train", -1])
def test_extracted_tickets_are_exact(tmp_path, fill_masks, route):
    model, noisy = routed(fill_masks), torch.randn(4, 301)
    ticket = model.extract_ticket(route).eval()
    expected = model(input_values=noisy, route_ids=route, labels=noisy)
    assert type(ticket) is SpeechUNet
    assert torch.equal(ticket(noisy).logits, expected.logits) and ticket(noisy, labels=noisy).loss == expected.loss
    ticket.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(noisy).logits, expected.logits)


def test_a_mixed_batch_is_each_sample_alone(fill_masks):
    model = routed(fill_masks).double()
    noisy, clean = torch.randn(2, 5, 301, dtype=torch.float64)
    routes = [2, 0, 1, 0, 2]
    mixed = model(input_values=noisy, labels=clean, route_ids=torch.tensor(routes))
    alone = [
        model(input_values=noisy[i : i + 1], labels=clean[i : i + 1], route_ids=route)
        for i, route in enumerate(routes)
    ]
    assert torch.allclose(mixed.logits, torch.cat([output.logits for output in alone]), atol=1e-12)
    assert float(mixed.loss) == pytest.approx(float(sum(output.loss for output in alone)) / 5, abs=1e-12)


def test_a_ticket_is_the_backbone_with_zeros(fill_masks):
    """Transposed convolutions are masked too, by a plain product."""
    model, noisy = routed(fill_masks, "shared"), torch.randn(2, 301)
    plain = copy.deepcopy(model.backbone).eval()
    with torch.no_grad():
        for name, mask in zip(model.mask_bank.weight_names, model.mask_bank["street"], strict=True):
            plain.get_parameter(name).mul_(mask)
    assert torch.equal(plain(noisy).logits, model(input_values=noisy, route_ids="street").logits)
