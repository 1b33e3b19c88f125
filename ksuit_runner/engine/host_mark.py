"""Tells whether something has drawn from the generators of numpy and of ``random``.

Seeding both takes 5 us, and asking for their states 15 us: too long for every update of a small model.
"""

import ctypes
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random.mtrand import get_bit_generator

_WORDS = 624  # that a Mersenne Twister makes at a time; both generators are one


class HostMark:
    """Remembers a state of the generators, and tells whether they are still there.

    Every draw moves a generator's position, or makes all of its words anew. So it is enough to compare the position and
    the last word of each: another state has the same ones with a probability of 2 ** -32. (The first word is of no use:
    it is the same for every seed of ``random``.)

    They are read from the memory in which CPython and numpy keep them. At the start, all words there are compared with
    what the generators say. Where these differ, whole states are compared instead, which only takes longer.
    """

    def __init__(self) -> None:
        self._source: Any = None  # numpy's generator, which a program may replace; held, as its memory is read
        self._read: Callable[[], Any] = _whole_states
        self._marked: Any = None

    def set(self) -> None:
        """Remember the present state."""
        source = get_bit_generator()
        if self._source is not source:
            self._source, self._read = source, _positions(source) or _whole_states
        self._marked = self._read()

    def is_here(self) -> bool:
        """Whether the generators have the state that is remembered."""
        return self._source is get_bit_generator() and bool(self._read() == self._marked)


def _whole_states() -> Any:
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def _positions(source: Any) -> Callable[[], Any] | None:
    """Return what reads the positions and last words of both; None if they are not where they are known to be.

    Args:
        source: The generator of ``numpy.random``.
    """
    own: Any = getattr(random.random, "__self__", None)
    if sys.implementation.name != "cpython" or not isinstance(source, np.random.MT19937):
        return None
    if type(own) is not random.Random or type(own).__basicsize__ < object.__basicsize__ + 4 * (1 + _WORDS):
        return None
    words = ctypes.c_uint32 * (_WORDS + 1)
    own_address: int = id(own) + object.__basicsize__  # int index; uint32_t state[624];
    address: int = source.ctypes.state_address  # uint32_t key[624]; int pos;
    state: Any = source.state["state"]
    own_words, numpy_words = random.getstate()[1], [*state["key"].tolist(), state["pos"]]
    if [*words.from_address(own_address)] != [own_words[-1], *own_words[:-1]]:
        return None
    if [*words.from_address(address)] != numpy_words:
        return None
    position = ctypes.c_uint32.from_address(own_address)
    last_word = ctypes.c_uint32.from_address(own_address + 4 * _WORDS)
    of_numpy = ctypes.c_uint64.from_address(address + 4 * (_WORDS - 1))  # last word and position, side by side
    return lambda: (position.value, last_word.value, of_numpy.value)
