"""Files that models answer: images, sounds and texts. Each reader raises `ValueError`, with the file's name."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.signal import resample_poly


def check_files(names: Sequence[str]) -> None:
    """Raises `ValueError` unless there are such files."""
    for name in names:
        if Path(name).is_dir():
            raise ValueError(f"{name!r} is a folder: give the files in it, such as {str(Path(name, '*'))!r}.")
        if not Path(name).exists():
            raise ValueError(f"there is no file {name!r}.")


def read_image(name: str, num_channels: int = 3) -> Any:
    """The image, upright: in colour, or for one channel as an array `uint8 [1, height, width]`."""
    try:
        with Image.open(name) as image:
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name!r} is no image that can be read: {error}") from error
    # Pipelines turn images into coloured ones, but leave arrays as they are.
    return np.array(upright.convert("L"))[np.newaxis] if num_channels == 1 else upright.convert("RGB")


def read_audio(name: str, sampling_rate: int) -> np.ndarray:
    """The sound as one channel, `float32 [samples]`, at `sampling_rate` Hz."""
    if importlib.util.find_spec("soundfile") is None:
        raise ValueError("audio needs soundfile: pip install hf_rtl[speech]")
    import soundfile

    try:
        audio, rate = soundfile.read(name, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name!r} is no audio that can be read: {error.error_string}") from error
    if not len(audio):
        raise ValueError(f"{name!r} holds no sound.")
    divisor = math.gcd(rate, sampling_rate)
    return resample_poly(audio.mean(axis=1), sampling_rate // divisor, rate // divisor).astype(np.float32)


def read_text(name: str) -> str:
    """The whole file as one text, without the space around it."""
    try:
        text = Path(name).read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is no text in UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{name!r} holds no text.")
    return text
