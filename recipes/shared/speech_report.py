"""The results of speech enhancement: SI-SNR improvement, tables and waveforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

from .methods import file_name
from .report import without_prefix
from .speech_data import Mixtures


MEAN = "SI-SNRi"
COSTS = ("union", "bytes", "emptied layers", "trainings", "samples in extraction", "samples in retraining")


def enhancement_metrics(enhanced: Tensor, test: Mixtures) -> dict[str, float]:
    """SI-SNR improvement in dB of the test mixtures `[N, samples]`: the mean per scene, and the mean of these."""
    by_scene = _means(_si_snr(enhanced, test) - _si_snr(test.noisy, test), test)
    metrics = {f"{name}/si_snr_improvement": value for name, value in by_scene.items()}
    return {"si_snr_improvement": sum(by_scene.values()) / len(by_scene), **metrics}


def input_ratios(test: Mixtures) -> dict[str, float]:
    """Mean SI-SNR of the test mixtures of every scene in dB, before any enhancement."""
    return _means(_si_snr(test.noisy, test), test)


def _si_snr(signals: Tensor, test: Mixtures) -> Tensor:
    """SI-SNR in dB, `[N]`, in float64: float32 is wrong by hundredths where hardly any signal is left (-47 dB)."""
    return scale_invariant_signal_noise_ratio(signals.double(), test.clean.double())


def _means(values: Tensor, test: Mixtures) -> dict[str, float]:
    return {name: float(values[test.scenes == scene].mean()) for scene, name in enumerate(test.scene_names)}


def report_line(report: Mapping[str, Any], scene_names: Sequence[str]) -> dict[str, Any]:
    """The line of a report, with the columns of all tables."""
    metrics = without_prefix(report["metrics"])
    return {
        "method": report["method"],
        "sparsity": report["at"],
        MEAN: metrics["si_snr_improvement"],
        **{name: metrics[f"{name}/si_snr_improvement"] for name in scene_names},
        "union": report["union"],
        "bytes": report["footprint"]["total_bytes"],
        "emptied layers": max(map(len, report["emptied_layers"].values()), default=0),
        **report["costs"],
    }


def split(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines by sparsity, as two tables: the improvements and the costs."""
    lines = sorted(lines, key=lambda line: line["sparsity"])
    figures = [{title: value for title, value in line.items() if title not in COSTS} for line in lines]
    costs = [{title: line[title] for title in ("method", "sparsity", *COSTS)} for line in lines]
    return {"figures": figures, "costs": costs}


def differences(lines: Sequence[dict[str, Any]], method: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """The improvements of `method` minus those of each of `others`, at every sparsity that both have."""
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
    """Writes waveforms `[scenes, samples]` of every kind as `SCENE-KIND.wav`, in 32-bit floats against clipping."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, waveforms in examples.items():
        for scene, waveform in zip(scene_names, waveforms, strict=True):
            file = folder / f"{scene}-{file_name(kind)}.wav"
            soundfile.write(file, waveform.numpy(), sampling_rate, subtype="FLOAT")
