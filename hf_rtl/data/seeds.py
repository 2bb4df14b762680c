"""The words of NumPy's `SeedSequence` for many keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


# The constants of `numpy.random.SeedSequence`, whose algorithm NumPy keeps for all versions.
_POOL_SIZE = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_SHIFT = np.uint32(16)
_LIMIT = 2**32


def spawned_words(seed: int, prefix: tuple[int, ...], keys: Sequence[tuple[int, ...]], num_words: int) -> np.ndarray:
    """
    `SeedSequence(seed, spawn_key=(*prefix, *key)).generate_state(num_words, np.uint64)` for each of `keys`:
    `uint64 [len(keys), num_words]`. Several times faster for a batch, since all keys are mixed in together.

    Args:
        seed (`int`): non-negative.
        prefix (`tuple[int, ...]`): what all spawn keys begin with; not empty.
        keys (`Sequence[tuple[int, ...]]`): how they go on; non-negative, of one length.
        num_words (`int`): words per key.
    """
    last = np.array(keys, dtype=np.uint64).T
    if (last >= _LIMIT).any():  # such a number has several words
        sequences = (np.random.SeedSequence(seed, spawn_key=(*prefix, *key)) for key in keys)
        return np.stack([sequence.generate_state(num_words, np.uint64) for sequence in sequences])
    pool, num_hashed = _pool_of_prefix(seed, prefix)
    pool = np.repeat(pool[:, None], len(keys), axis=1)
    for word in last.astype(np.uint32):
        pool = _mix_in(pool, word, num_hashed)
        num_hashed += _POOL_SIZE
    count = 2 * num_words
    multipliers = _powers(_INIT_B, _MULT_B, 0, count + 1)[:, None]
    state = pool[np.arange(count) % _POOL_SIZE] ^ multipliers[:-1]
    state *= multipliers[1:]
    state ^= state >> _SHIFT
    low, high = state[0::2].astype(np.uint64), state[1::2].astype(np.uint64)
    return (low | high << np.uint64(32)).T


@lru_cache(maxsize=256)
def _pool_of_prefix(seed: int, prefix: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The pool after `seed` and `prefix`, `uint32 [4]`, and how many words have been hashed."""
    entropy = _words(seed)
    entropy += [0] * (_POOL_SIZE - len(entropy))
    entropy += [word for number in prefix for word in _words(number)]
    # The first words fill the pool, which is then mixed with itself.
    pool = _hash(np.array(entropy[:_POOL_SIZE], np.uint32), _powers(_INIT_A, _MULT_A, 0, _POOL_SIZE + 1))
    num_hashed = _POOL_SIZE
    for source in range(_POOL_SIZE):
        others = [place for place in range(_POOL_SIZE) if place != source]
        multipliers = _powers(_INIT_A, _MULT_A, num_hashed, _POOL_SIZE)
        pool[others] = _mix(pool[others], _hash(pool[source], multipliers))
        num_hashed += len(others)
    for word in entropy[_POOL_SIZE:]:
        pool = _mix_in(pool[:, None], np.array([word], np.uint32), num_hashed)[:, 0]
        num_hashed += _POOL_SIZE
    return pool, num_hashed


def _mix_in(pool: np.ndarray, word: np.ndarray, num_hashed: int) -> np.ndarray:
    """The pool `[4, n]` after another word of each of n sequences, `[n]`."""
    return _mix(pool, _hash(word[None], _powers(_INIT_A, _MULT_A, num_hashed, _POOL_SIZE + 1)[:, None]))


def _hash(values: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    hashed = (values ^ multipliers[:-1]) * multipliers[1:]
    return hashed ^ hashed >> _SHIFT


def _mix(pool: np.ndarray, hashed: np.ndarray) -> np.ndarray:
    mixed = _MIX_LEFT * pool - _MIX_RIGHT * hashed
    return mixed ^ mixed >> _SHIFT


@lru_cache(maxsize=256)
def _powers(first: int, factor: int, start: int, count: int) -> np.ndarray:
    """`first * factor**k` modulo 2**32 for k from `start` on: `uint32 [count]`."""
    return np.array([first * pow(factor, start + k, _LIMIT) % _LIMIT for k in range(count)], np.uint32)


def _words(number: int) -> list[int]:
    """The 32-bit words of a non-negative number, the lowest first; at least one."""
    words = [number % _LIMIT]
    while number := number // _LIMIT:
        words.append(number % _LIMIT)
    return words
