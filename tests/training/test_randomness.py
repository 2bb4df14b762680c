"""Settings of random numbers and rounding are set, and restored."""

import os
import random

import numpy as np
import pytest
import torch

from hf_rtl.training.randomness import Stream, derive_seed, numerics_environment, reproducible, seeded


def settings():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("before", [False, True])
def test_settings_are_put_back_also_after_an_error(before):
    threads = torch.get_num_threads()
    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        torch.backends.cudnn.benchmark = before
        found = settings()
        with pytest.raises(KeyError):
            with reproducible(threads + 1):
                assert settings() == (threads + 1, True, True, False, False)
                assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
                raise KeyError
        assert settings() == found
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_seeds_depend_on_every_word_and_streams_differ():
    words = [(2, 1, 3), (2, 3, 1), (3, 2, 1), *((1, stream, 0) for stream in Stream)]
    seeds = [derive_seed(*word) for word in words]
    assert len(set(seeds)) == len(words) and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [derive_seed(*word) for word in words]
    drawn = []
    for word in words:
        with seeded(word, torch.device("cpu")):
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert len({value for values in drawn for value in values}) == 3 * len(words)


def test_surroundings_are_plain_and_change_with_what_decides_rounding():
    before = numerics_environment(torch.device("cpu"))
    assert before["device"] and all(isinstance(value, str) for value in before.values())
    try:
        torch.set_float32_matmul_precision("medium")
        assert numerics_environment(torch.device("cpu"))["matmul_precision"] == "medium" != before["matmul_precision"]
    finally:
        torch.set_float32_matmul_precision(before["matmul_precision"])
