"""The paper's speech enhancement network, a U-Net that predicts a complex ratio mask, as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput, can_return_tuple


__all__ = ["SpeechUNet", "SpeechUNetConfig", "SpeechUNetOutput", "weighted_sdr_loss"]


class SpeechUNetConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SpeechUNet`]. The defaults are the paper's (section 4.3).

    Args:
        channels (`list[int]`, *optional*, defaults to `[12, 12, 12, 24, 48]`): output channels of the encoder's
            layers, each of which halves the frequencies.
        window_length (`int`, *optional*, defaults to 1024): samples of a short-time spectrum, a multiple of
            2 ** (layers + 1), so that the decoder ends with as many frequencies as the encoder started from.
        hop_length (`int`, *optional*, defaults to 256): samples from one spectrum to the next.
        sampling_rate (`int`, *optional*, defaults to 16000): of the waveforms, in Hz; for the record.

    Raises:
        ValueError: no channels, or a `window_length` or `hop_length` that does not fit.
    """

    model_type = "speech_unet"

    channels: list[int] = field(default_factory=lambda: [12, 12, 12, 24, 48])
    window_length: int = 1024
    hop_length: int = 256
    sampling_rate: int = 16_000

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(
                f"`channels` must be positive numbers, one per layer of the encoder, got {self.channels}."
            )
        unit = 2 ** (len(self.channels) + 1)
        if self.window_length < 1 or self.window_length % unit:
            raise ValueError(
                f"`window_length` must be a multiple of {unit} for {len(self.channels)} layers that halve the "
                f"frequencies, got {self.window_length}."
            )
        if not 1 <= self.hop_length <= self.window_length // 2:
            raise ValueError(
                f"`hop_length` must be from 1 to half of `window_length` = {self.window_length}, got "
                f"{self.hop_length}."
            )
        super().__post_init__(**kwargs)


@dataclass
class SpeechUNetOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): weighted SDR loss, a scalar from -1 to 1, if there are labels.
        logits (`Tensor`): enhanced waveforms `[batch, samples]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class SpeechUNet(PreTrainedModel):
    """
    Enhances speech: from a noisy waveform to the clean one (paper, section 4.3).

    The complex short-time spectrum, as channels `[batch, 2, frames, frequencies]` of its real and its imaginary part,
    goes through an encoder of convolutions with stride (1, 2) and a mirrored decoder of transposed convolutions, which
    gets the encoder's outputs by concatenation. Kernels are 3 x 3, in the first and the last layer 3 x 5; batch norm
    and ELU follow every layer but the last, whose two channels are a complex ratio mask. Its magnitude is bounded by
    tanh (Choi et al. 2019, section 3.2), its phase is not. The mask times the spectrum is the enhanced one.

    Our readings, where the paper is silent: the stride of 2 is that of frequency; the layers before a batch norm have
    no bias; the network sees the spectrum divided by the waveform's level, so that loudness does not matter.

    All ten layers are prunable, the first and the last too: 37,368 weights, as the paper counts them (IMP multiple,
    three models: 84.1K, 56.1K and 28.0K at 25, 50 and 75 %).
    """

    config_class = SpeechUNetConfig
    config: SpeechUNetConfig
    main_input_name = "input_values"

    def __init__(self, config: SpeechUNetConfig) -> None:
        super().__init__(config)
        widths = [2, *config.channels]
        layers = list(range(len(config.channels)))
        # Outermost first in both lists: layer i of the decoder undoes layer i of the encoder.
        self.encoder = nn.ModuleList([_layer(nn.Conv2d, i, widths[i], widths[i + 1]) for i in layers])
        self.decoder = nn.ModuleList()
        for i in layers:
            # The innermost layer reads only the encoder's output. The others also read the encoder's at their depth.
            inputs = widths[i + 1] if i == layers[-1] else 2 * widths[i + 1]
            self.decoder.append(_layer(nn.ConvTranspose2d, i, inputs, widths[i], is_last=i == 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # As torch initialises them: Kaiming uniform over the fan-in with a = sqrt(5), also for transposed ones.
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            initialization.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)

    @can_return_tuple
    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> SpeechUNetOutput | tuple[Tensor, ...]:
        """
        Args:
            input_values (`Tensor`): noisy waveforms `[batch, samples]`, floats, of any length and loudness.
            labels (`Tensor`, *optional*): clean waveforms `[batch, samples]`, for the loss.
            return_dict (`bool`, *optional*): as a keyword; defaults to the configuration's.

        Raises:
            ValueError: waveforms of another shape.
        """
        if input_values.ndim != 2 or (labels is not None and labels.shape != input_values.shape):
            shapes = [list(tensor.shape) for tensor in (input_values, labels) if tensor is not None]
            raise ValueError(
                "`input_values`, and `labels` of the same shape, must be waveforms [batch, samples], got "
                f"{' and '.join(map(str, shapes))}."
            )
        # Half types have no Fourier transform.
        noisy = input_values.to(torch.promote_types(input_values.dtype, torch.float32))
        window_length, hop_length = self.config.window_length, self.config.hop_length
        window = torch.hann_window(window_length, dtype=noisy.dtype, device=noisy.device)
        spectrum = torch.stft(
            noisy,
            window_length,
            hop_length,
            window=window,
            normalized=True,
            pad_mode="constant",
            return_complex=True,
        )
        level = noisy.square().mean(dim=1).sqrt().clamp_min(1e-8)
        mask = self._mask(spectrum / level[:, None, None])
        enhanced = torch.istft(
            mask * spectrum, window_length, hop_length, window=window, normalized=True, length=noisy.shape[1]
        )
        loss = None if labels is None else weighted_sdr_loss(enhanced, labels.to(noisy.dtype), noisy)
        return SpeechUNetOutput(loss=loss, logits=enhanced)

    def _mask(self, spectrum: Tensor) -> Tensor:
        """The complex ratio mask of a complex spectrum, both `[batch, frequencies, frames]`."""
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [batch, 2, frames, frequencies]
        x = x.to(self.dtype)
        skipped = []
        for layer in self.encoder:
            x = layer(x)
            skipped.append(x)
        x = self.decoder[-1](skipped.pop())
        for layer in reversed(self.decoder[:-1]):
            x = layer(torch.cat([x, skipped.pop()], dim=1))
        mask = x.to(spectrum.real.dtype)
        # Not abs(): its gradient would be NaN at zero, the output of a ticket that keeps nothing.
        magnitude = mask.square().sum(dim=1, keepdim=True).add(1e-12).sqrt()
        mask = mask * (magnitude.tanh() / magnitude)
        return torch.view_as_complex(mask.permute(0, 3, 2, 1).contiguous())


def weighted_sdr_loss(enhanced: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """
    The weighted SDR loss of Choi et al. 2019 (wSDR), the mean over a batch, from -1 (perfect) to 1.

    For each waveform, minus the cosine between the clean and the enhanced speech, and minus that between the noise and
    the removed part, weighted by the energies of speech and noise: α = ‖clean‖² / (‖clean‖² + ‖noise‖²).

    Args:
        enhanced, clean, noisy (`Tensor`): floats `[batch, samples]`.
    """
    noise, removed = noisy - clean, noisy - enhanced
    speech_energy, noise_energy = clean.square().sum(dim=1), noise.square().sum(dim=1)
    alpha = speech_energy / (speech_energy + noise_energy).clamp_min(torch.finfo(clean.dtype).tiny)
    return -(alpha * _cosine(clean, enhanced) + (1 - alpha) * _cosine(noise, removed)).mean()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between rows; 0 where one of them is silent."""
    # Each norm is bounded, since the square of a smaller product would vanish in float32 and make the gradient NaN.
    norms = [torch.linalg.vector_norm(x, dim=1).clamp_min(1e-8) for x in (a, b)]
    return (a * b).sum(dim=1) / (norms[0] * norms[1])


def _layer(kind: Any, index: int, inputs: int, outputs: int, *, is_last: bool = False) -> nn.Sequential:
    """Layer `index`, counted from outside; the last has a bias, but no norm. Sizes are (time, frequency)."""
    kernel = (3, 5) if index == 0 else (3, 3)
    padding = tuple(size // 2 for size in kernel)
    convolution = kind(inputs, outputs, kernel, stride=(1, 2), padding=padding, bias=is_last)
    return nn.Sequential(convolution, *(() if is_last else (nn.BatchNorm2d(outputs), nn.ELU())))


AutoConfig.register(SpeechUNetConfig.model_type, SpeechUNetConfig, exist_ok=True)
AutoModel.register(SpeechUNetConfig, SpeechUNet, exist_ok=True)
