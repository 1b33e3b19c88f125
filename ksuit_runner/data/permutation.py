"""A keyed pseudorandom permutation, any part of which is computed on its own, without memory."""

from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.keyed_random import mix

_ROUNDS: Final = 4  # pairs: each changes both halves once; four single ones make a pseudorandom permutation in theory
_LOW: Final = np.uint64(32)
_MIXES: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


class KeyedPermutation:
    """A pseudorandom permutation of ``0 ... length - 1`` that belongs to a key.

    It is a Feistel network over pairs ``(left, right)`` of ``width * height`` numbers, which is a little more than
    ``length``; a number that comes out too large goes through the network again until one is in range (cycle walking).
    Both steps are invertible, so that no number comes twice, however the halves are hashed.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, the generalized Feistel cipher. The
    halves are hashed with the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): made for shuffling data,
    not for keeping secrets.

    Args:
        key: Parts of the key; another key gives another permutation.
        length: How many numbers are permuted, at most 2**62.
    """

    def __init__(self, *key: int | str, length: int) -> None:
        assert 0 < length <= 2**62, length
        self.length = length
        # Halves of about the same size below 2**32; fewer than one number in isqrt(length) has to walk.
        self._width = isqrt(length - 1) + 1
        self._height = -(-length // self._width)
        self._keys = [(_number(*key, turn, "left"), _number(*key, turn, "right")) for turn in range(_ROUNDS)]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at these positions of the permutation, int64 of the same shape."""
        found = self._network(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.length)).size:
            found[outside] = self._network(found[outside])
        return found.view(np.int64)

    def _network(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        width, height = np.uint64(self._width), np.uint64(self._height)
        right, left = np.divmod(numbers, width)
        for left_key, right_key in self._keys:
            _turn(left, right, left_key, width)
            _turn(right, left, right_key, height)
        right *= width
        right += left
        return right


def _turn(half: NDArray[np.uint64], other: NDArray[np.uint64], key: np.uint64, size: np.uint64) -> None:
    """Add to one half, modulo its size, a number that only the other half and the key decide."""
    mixed = other + key
    for shift, factor in _MIXES:
        mixed ^= mixed >> shift
        mixed *= factor  # modulo 2**64
    # The upper 32 bits, as a fraction of the size: without a division, and without a noticeable bias.
    mixed >>= _LOW
    mixed *= size
    mixed >>= _LOW
    half += mixed
    np.subtract(half, size, out=half, where=half >= size)


def _number(*parts: int | str) -> np.uint64:
    return np.uint64(mix(*parts))
