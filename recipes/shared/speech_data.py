"""Speech mixed with the noise of scenes, as tensors in memory, from any two folders of audio."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers.hf_argparser import HfArg

from .audio import read_audio


AUDIO = (".flac", ".mp3", ".ogg", ".wav")
TRAIN, TEST = range(2)
# Test mixtures are drawn by this seed in every run, so that runs of several seeds share them.
_TEST_SEED = 0
# A segment has at least this fraction of its recording's mean power, since the SNR of a pause is meaningless.
_LEAST_POWER = 0.1


@dataclass
class SpeechArguments:
    """Which speech and noise a recipe reads, and how they are mixed."""

    speech: str = HfArg(
        default="speech",
        help="Folder of clean speech: train*.parquet and test*.parquet with a column 'audio' of {bytes, path}, "
        "or audio files, of which the last are for testing, by name.",
    )
    noise: str = HfArg(default="noise", help="Folder of noise: a subfolder of audio files for every scene.")
    noise_scenes: str | None = HfArg(
        default=None,
        help="{scene: [files]} for a noise folder without subfolders, as a mapping in the configuration or as "
        "JSON. The scenes are the routes, in this order.",
    )
    snrs: list[float] = HfArg(
        default_factory=lambda: [0.0, 5.0, 10.0], help="Signal-to-noise ratios in dB, which the mixtures take in turn."
    )
    segment_seconds: float = HfArg(default=1.0, help="Length of a mixture in seconds; shorter speech is padded.")
    sampling_rate: int = HfArg(default=16_000, help="Sampling rate in Hz; all audio is resampled to it.")
    num_train: int = HfArg(default=300, help="Training mixtures of every scene.")
    num_test: int = HfArg(default=100, help="Test mixtures of every scene, the same for every seed.")
    speech_test_fraction: float = HfArg(default=0.2, help="Fraction of the audio files of speech that is for testing.")
    noise_train_fraction: float = HfArg(
        default=0.7, help="Fraction of every noise recording, from its beginning, that is for training."
    )


class Mixtures(Dataset):
    """
    Noisy and clean waveforms, `float32 [N, samples]`, and their scenes, `int64 [N]`, served as `input_values`,
    `labels` and `scene`.
    """

    column_names = ["input_values", "labels", "scene"]

    def __init__(self, noisy: Tensor, clean: Tensor, scenes: Tensor, scene_names: Sequence[str]) -> None:
        self.noisy, self.clean, self.scenes, self.scene_names = noisy, clean, scenes, list(scene_names)

    def __len__(self) -> int:
        return len(self.noisy)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_values": self.noisy[index],
            "labels": self.clean[index],
            "scene": int(self.scenes[index]),
        }


def stack(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of mixtures without `scene`, with `route_ids` if the samples have them, as in evaluation."""
    batch = default_collate(samples)
    batch.pop("scene", None)
    return batch


def load_mixtures(arguments: SpeechArguments, *, seed: int) -> tuple[Mixtures, Mixtures]:
    """
    Training and test mixtures, `num_train` and `num_test` of every scene.

    Training and test mixtures share no clip of speech. The beginning of every noise recording is for training, the
    rest for testing. A scene's recordings are drawn with equal probabilities, independent of their lengths. Test
    mixture i has the same segment of speech and the same ratio in all scenes.

    Raises:
        ValueError: a folder has no audio, or a noise recording is too short.
    """
    length = round(arguments.segment_seconds * arguments.sampling_rate)
    speech = read_speech(arguments)
    noise = {
        scene: [
            split_by_time(read_audio(file, arguments.sampling_rate), arguments.noise_train_fraction, length, file)
            for file in files
        ]
        for scene, files in scene_files(arguments).items()
    }
    sets = []
    for part, count in ((TRAIN, arguments.num_train), (TEST, arguments.num_test)):
        noisy, clean = [], []
        for number, recordings in enumerate(noise.values()):
            of_speech = np.random.default_rng([seed, number] if part == TRAIN else _TEST_SEED)
            of_noise = np.random.default_rng([seed if part == TRAIN else _TEST_SEED, number, 1 + part])
            order = of_speech.permutation(len(speech[part]))
            for index in range(count):
                voice = draw_segment(speech[part][order[index % len(order)]], length, of_speech)
                recording = recordings[of_noise.integers(len(recordings))][part]
                snr = arguments.snrs[index % len(arguments.snrs)]
                noisy.append(mix(voice, draw_segment(recording, length, of_noise), snr))
                clean.append(voice)
        scenes = torch.arange(len(noise)).repeat_interleave(count)
        sets.append(
            Mixtures(torch.from_numpy(np.stack(noisy)), torch.from_numpy(np.stack(clean)), scenes, list(noise))
        )
    return sets[TRAIN], sets[TEST]


def mix(speech: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """`speech` plus `noise`, `float32 [samples]`, scaled so that speech has `snr` dB more energy than the noise."""
    ratio = np.square(speech, dtype=np.float64).sum() / np.square(noise, dtype=np.float64).sum()
    return (speech + noise * math.sqrt(ratio / 10 ** (snr / 10))).astype(np.float32)


def draw_segment(audio: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """A random segment of `length` samples outside pauses; shorter audio is padded with zeros."""
    if len(audio) <= length:
        return np.pad(audio, (0, length - len(audio)))
    energy = np.concatenate([[0.0], np.square(audio, dtype=np.float64).cumsum()])
    powers = (energy[length:] - energy[:-length]) / length
    starts = np.flatnonzero(powers >= _LEAST_POWER * energy[-1] / len(audio))
    start = generator.choice(starts)
    return audio[start : start + length]


def split_by_time(audio: np.ndarray, fraction: float, length: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first `fraction` of a recording, and the rest. Raises `ValueError` if one is shorter than `length`."""
    parts = audio[: round(fraction * len(audio))], audio[round(fraction * len(audio)) :]
    if min(map(len, parts)) < length:
        raise ValueError(
            f"the noise recording {file.name!r} has {len(audio):,} samples, of which {fraction:.0%} are for training: "
            f"a part is shorter than a mixture, {length:,} samples. Leave it out, or lower --segment_seconds."
        )
    return parts


def read_speech(arguments: SpeechArguments) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The clips of speech for training and for testing."""
    folder, rate = Path(arguments.speech).expanduser(), arguments.sampling_rate
    if any(folder.glob("*.parquet")):
        from pyarrow import parquet

        tables = [
            [parquet.read_table(file, columns=["audio"]) for file in sorted(folder.glob(f"{part}*.parquet"))]
            for part in ("train", "test")
        ]
        train, test = (
            [io.BytesIO(audio["bytes"]) for table in part for audio in table["audio"].to_pylist()] for part in tables
        )
    else:
        files = _audio_files(folder, "speech")
        num_test = max(1, round(arguments.speech_test_fraction * len(files)))
        train, test = files[:-num_test], files[-num_test:]
    return [read_audio(file, rate) for file in train], [read_audio(file, rate) for file in test]


def scene_files(arguments: SpeechArguments) -> dict[str, list[Path]]:
    """Scene -> the files of its noise recordings."""
    folder = Path(arguments.noise).expanduser()
    # The argument is text on the command line, and may be a mapping in a configuration.
    scenes: Any = arguments.noise_scenes
    scenes = yaml.safe_load(scenes) if isinstance(scenes, str) else scenes
    if scenes is None:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
        if not subfolders:
            raise ValueError(f"the noise folder {folder.name!r} has no subfolders; name its scenes by --noise_scenes.")
        return {path.name: _audio_files(path, "noise") for path in subfolders}
    return {scene: [folder / name for name in names] for scene, names in scenes.items()}


def _audio_files(folder: Path, argument: str) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
    if not files:
        raise ValueError(f"--{argument}: there is no audio ({', '.join(AUDIO)}) in {folder.name!r}.")
    return files
