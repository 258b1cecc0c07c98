"""Random numbers of data sets: a counter-based hash of integers, the same on every machine and in every process.

It is the finaliser of SplitMix64 (Steele et al. 2014). Nothing here touches a library's random state.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit words one by one."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(*words: int | np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of integers, elementwise over arrays: the source of all randomness in data sets."""
    x = np.zeros(1, np.uint64)
    for word in words:
        x = mix((x ^ np.asarray(word).astype(np.uint64)) + GOLDEN)
    return x


def permutation(n: int, *words: int) -> np.ndarray:
    """Return the order of 0..n-1 that belongs to `words`, whatever the version of any library."""
    return np.argsort(hashed(*words, np.arange(n)), kind="stable")


class Draws:
    """Uniform integers for `[B]` pictures, a fresh one at every call."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.calls = keys, 0

    def __call__(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Return integers in low..high inclusive, `[B, *shape]`."""
        count = int(np.prod(shape))
        counter = np.arange(self.calls, self.calls + count, dtype=np.uint64)
        self.calls += count
        words = mix(self.keys[:, None] + (counter + np.uint64(1)) * GOLDEN) >> np.uint64(32)
        return (low + ((words * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int64)).reshape(-1, *shape)
