"""Random streams, and the other settings that decide a result to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Stream(IntEnum):
    """The first word of the key of each random stream, so that no two uses share a stream."""

    EXTRACTION = 0
    RETRAINING = 1
    REWINDING = 2
    RECALIBRATION = 3
    READING = 4
    REHEARSAL = 5
    EVALUATION = 6
    SCORING = 7


def derive_seed(*words: int) -> int:
    """A seed below 2**32 that depends on all `words`."""
    return int(np.random.SeedSequence(list(words)).generate_state(1)[0])


@contextlib.contextmanager
def seeded(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Seeds the generators of torch, NumPy and Python with `seed`, and restores their states afterwards."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(list(seed)).generate_state(3, np.uint64).tolist()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        if devices:
            torch.manual_seed(for_torch)
        else:  # `torch.manual_seed` seeds accelerators too, and formats the call stack for each, at every call
            torch.default_generator.manual_seed(for_torch)
        # Some models, such as Wav2Vec2, mask their input with NumPy's generator.
        np.random.seed(for_numpy % 2**32)
        random.seed(for_python)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextlib.contextmanager
def reproducible(num_threads: int) -> Iterator[None]:
    """
    Makes rounding depend on inputs, versions and kind of device only: sets the number of CPU threads, and uses
    deterministic algorithms (torch warns of operations without one). Restores the settings afterwards.
    """
    threads = torch.get_num_threads()
    deterministic_settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = deterministic_settings.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    # cuBLAS needs this variable to be deterministic, and reads it on first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic_settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        deterministic_settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.set_num_threads(threads)


def numerics_environment(device: torch.device) -> dict[str, str]:
    """What rounding depends on besides inputs and versions: the device and its numerical settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "any",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
    }
