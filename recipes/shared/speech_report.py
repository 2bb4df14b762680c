"""What comes of speech enhancement: SI-SNR improvement, tables, spectrograms and waveforms."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

from .speech_data import Mixtures


MEAN = "SI-SNRi"
COSTS = ("union", "bytes", "emptied layers", "trainings", "samples in extraction", "samples in retraining")
# Decibels below the loudest that spectrograms show.
_RANGE = 60.0


def enhancement_metrics(enhanced: Tensor, test: Mixtures) -> dict[str, float]:
    """SI-SNR improvement of the test mixtures `[N, samples]` in dB: the mean of every scene, and the mean of these."""
    after = scale_invariant_signal_noise_ratio(enhanced, test.clean)
    gains = after - scale_invariant_signal_noise_ratio(test.noisy, test.clean)
    of_scenes = _means(gains, test)
    metrics = {f"{name}/si_snr_improvement": value for name, value in of_scenes.items()}
    return {"si_snr_improvement": sum(of_scenes.values()) / len(of_scenes), **metrics}


def input_ratios(test: Mixtures) -> dict[str, float]:
    """Mean SI-SNR of the test mixtures of every scene in dB, before any enhancement."""
    return _means(scale_invariant_signal_noise_ratio(test.noisy, test.clean), test)


def _means(values: Tensor, test: Mixtures) -> dict[str, float]:
    return {name: float(values[test.scenes == scene].mean()) for scene, name in enumerate(test.scene_names)}


def line_of(method: str, report: Mapping[str, Any], scene_names: Sequence[str]) -> dict[str, Any]:
    """All of a report that the tables show."""
    metrics = {name.removeprefix("eval_"): value for name, value in report["metrics"].items()}
    return {
        "method": method,
        "sparsity": report["at"],
        MEAN: metrics["si_snr_improvement"],
        **{name: metrics[f"{name}/si_snr_improvement"] for name in scene_names},
        "union": report["union"],
        "bytes": report["footprint"]["total_bytes"],
        "emptied layers": max(map(len, report["emptied_layers"].values()), default=0),
        **report["costs"],
    }


def split(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines by sparsity, as two tables: how much speech gains, and what it costs."""
    lines = sorted(lines, key=lambda line: line["sparsity"])
    figures = [{title: value for title, value in line.items() if title not in COSTS} for line in lines]
    costs = [{title: line[title] for title in ("method", "sparsity", *COSTS)} for line in lines]
    return {"figures": figures, "costs": costs}


def differences(lines: Sequence[dict[str, Any]], method: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """The gains of `method` minus those of each of the `others`, on the same mixtures, at every sparsity of both."""
    at = {(line["method"], line["sparsity"]): line for line in lines}
    return [
        {
            "method": f"{method} − {other}",
            "sparsity": sparsity,
            **{
                title: at[method, sparsity][title] - line[title]
                for title in line
                if title not in ("method", "sparsity", *COSTS)
            },
        }
        for other in others
        for (name, sparsity), line in at.items()
        if name == other and (method, sparsity) in at
    ]


def write_audio(folder: Path, examples: Mapping[str, Tensor], scene_names: Sequence[str], sampling_rate: int) -> None:
    """Writes waveforms `[scenes, samples]` of every kind as `SCENE-KIND.wav`, 32-bit floats, so that none clips."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, waveforms in examples.items():
        for scene, waveform in zip(scene_names, waveforms, strict=True):
            file = folder / f"{scene}-{kind.replace(',', '').replace(' ', '-')}.wav"
            soundfile.write(file, waveform.numpy(), sampling_rate, subtype="FLOAT")


def spectrograms(file: Path, examples: Mapping[str, Tensor], scene_names: Sequence[str], sampling_rate: int) -> None:
    """Draws the waveforms `[scenes, samples]` of every kind, a row for a scene and a column for a kind, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    num_samples = next(iter(examples.values())).shape[1]
    extent = (0, num_samples / sampling_rate, 0, sampling_rate / 2000)
    size = (2.1 * len(examples) + 1, 1.7 * len(scene_names) + 0.5)
    figure, axes = pyplot.subplots(
        len(scene_names), len(examples), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for column, (kind, waveforms) in enumerate(examples.items()):
        for row, scene in enumerate(scene_names):
            levels = _levels(waveforms[row], examples["clean"][row])
            image = axes[row, column].imshow(
                levels, origin="lower", aspect="auto", extent=extent, cmap="cividis", vmin=-_RANGE, vmax=0
            )
            if column == 0:
                axes[row, 0].set_ylabel(f"{scene}\nkHz")
        axes[0, column].set_title(kind, fontsize=10)
        axes[-1, column].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label="dB below the loudest of clean")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=75)
    pyplot.close(figure)
    # Noise compresses badly; with few colours the file is a third.
    Image.open(buffer).convert("RGB").quantize(48).save(file, optimize=True)


def _levels(waveform: Tensor, clean: Tensor) -> Tensor:
    """Decibels `[128 frequencies, frames]` relative to the loudest of the clean speech."""
    window = torch.hann_window(256)
    power, of_clean = (
        torch.stft(x, 256, 256, window=window, return_complex=True)[:128].abs().square() for x in (waveform, clean)
    )
    return 10 * (power / of_clean.max()).clamp_min(1e-12).log10()
