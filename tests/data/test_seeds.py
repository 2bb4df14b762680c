"""Many seeds at once: NumPy's own, to the bit."""

import numpy as np
import pytest

from hf_rtl.data.seeds import spawned_words


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**40 + 3, 2**64 + 5, 2**130 + 7, 2**200 + 1])
@pytest.mark.parametrize("prefix", [(1,), (1, 0, 3), (1, 2**33, 5)])
def test_words_are_those_of_numpy(seed, prefix):
    generator = np.random.default_rng(0)
    keys = [(0, 0, 0), (1, 2, 3), (2**32 - 1, 2**31 - 1, 7)]
    keys += [tuple(row) for row in generator.integers(0, 2**32, (20, 3)).tolist()]
    for some in (keys, keys[:1], [*keys, (2**32, 0, 1)]):
        for count in (1, 3, 5):
            expected = [np.random.SeedSequence(seed, spawn_key=(*prefix, *key)) for key in some]
            expected = np.stack([sequence.generate_state(count, np.uint64) for sequence in expected])
            found = spawned_words(seed, prefix, some, count)
            assert found.dtype == np.uint64 and np.array_equal(found, expected)
