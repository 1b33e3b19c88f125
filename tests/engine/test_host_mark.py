"""Watching the generators of numpy and random: by their positions in memory, and without them."""

import random

import numpy as np
import pytest
from numpy.random.mtrand import get_bit_generator

from ksuit_runner.engine import host_mark
from ksuit_runner.engine.host_mark import HostMark
from ksuit_runner.keyed_random import seed_host

DRAWS = {
    "random": random.random,
    "bits": lambda: random.getrandbits(1),
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2]),
    "a whole turn of random": lambda: random.getrandbits(32 * 624),
    "seeded random": lambda: random.seed(6),
    "numpy": np.random.random,
    "one bit of numpy": lambda: np.random.randint(2, dtype=np.uint8),
    "normal": np.random.randn,
    "a whole turn of numpy": lambda: np.random.bytes(4 * 624),
    "seeded numpy": lambda: np.random.seed(6),
}


@pytest.fixture(params=["positions", "whole states"])
def mark(request, monkeypatch):
    if request.param == "whole states":
        monkeypatch.setattr(host_mark, "_positions", lambda source: None)
    return HostMark()


def test_they_are_where_they_are_known_in_this_python():
    assert host_mark._positions(get_bit_generator()) is not None


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_whatever_draws_is_noticed_until_it_is_undone(mark, draw):
    assert not mark.is_here()
    seed_host(5)
    mark.set()
    assert mark.is_here()
    draw()
    assert not mark.is_here()
    seed_host(5)
    assert mark.is_here()


def test_a_state_that_is_put_back_is_the_same(mark):
    seed_host(5)
    mark.set()
    numpy_state, own_state = np.random.get_state(), random.getstate()
    random.gauss(0, 1), np.random.randn()
    np.random.set_state(numpy_state)
    assert not mark.is_here()
    random.setstate(own_state)
    assert mark.is_here()


def test_a_generator_that_replaces_that_of_numpy_is_another_state(mark):
    seed_host(5)
    mark.set()
    source = get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(5))
        assert not mark.is_here()
        mark.set()
        assert mark.is_here()
        np.random.random()
        assert not mark.is_here()
        np.random.set_bit_generator(np.random.Philox(5))  # which can only be asked
        mark.set()
        assert mark.is_here()
        np.random.random()
        assert not mark.is_here()
    finally:
        np.random.set_bit_generator(source)


def test_words_that_are_elsewhere_are_not_taken_for_the_state(monkeypatch):
    shifted = tuple(reversed(random.getstate()[1]))
    monkeypatch.setattr(random, "getstate", lambda: (3, shifted, None))
    assert host_mark._positions(get_bit_generator()) is None
