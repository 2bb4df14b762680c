"""Reading sounds with soundfile (`pip install "hf_rtl[speech]"`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.signal import resample_poly


def read_audio(source: Any, sampling_rate: int) -> np.ndarray:
    """An audio file that soundfile can read, as one channel, `float32 [samples]`, at `sampling_rate` Hz."""
    import soundfile

    audio, rate = soundfile.read(source, dtype="float32", always_2d=True)
    divisor = math.gcd(rate, sampling_rate)
    return resample_poly(audio.mean(axis=1), sampling_rate // divisor, rate // divisor).astype(np.float32)
