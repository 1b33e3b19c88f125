"""Pseudorandom numbers that belong to a key and a position: any part of the sequence, without what comes before."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.keyed_random import mix

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_MIXES: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def uniform(*key: int | str, start: int, stop: int) -> NDArray[np.float64]:
    """Return the numbers from one position to before another of a sequence that is uniform in [0, 1).

    Source: SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), whose
    n-th number is a hash of n. It is the same with every version of numpy.

    Args:
        *key: Parts of the key; another key gives another sequence.
        start: First position, 0 or more.
        stop: Position after the last one.
    """
    state = np.arange(start + 1, stop + 1, dtype=np.uint64)
    state *= _STEP  # modulo 2**64
    state += np.uint64(mix(*key))
    for shift, factor in _MIXES:
        state ^= state >> shift
        state *= factor
    state ^= state >> np.uint64(31)
    state >>= np.uint64(11)
    return state.astype(np.float64) * 2.0**-53
