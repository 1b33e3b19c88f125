"""A shuffle is judged by statistics: fixed keys, so that each number is the same every time, and five sigma."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksuit_runner.data.permutation import KeyedPermutation

LENGTH = 70_001


def permutation(key, length=LENGTH):
    return KeyedPermutation(key, length=length)(np.arange(length))


def is_uniform(counts, expected):
    """Whether counts are as even as those of independent draws: chi-squared within five sigma, on both sides."""
    chi, degrees = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(chi - degrees) < 5 * np.sqrt(2 * degrees)


@given(key=st.integers(0, 2**62), length=st.integers(1, 500))
def test_every_number_comes_once(key, length):
    found = permutation(key, length)
    assert found.dtype == np.int64
    assert np.sort(found).tolist() == list(range(length))


@pytest.mark.parametrize("length", [LENGTH, 2**16, 257**2, 257**2 - 1, 257**2 + 1])
def test_every_number_comes_once_in_long_ones(length):
    assert (np.sort(permutation(3, length)) == np.arange(length)).all()


@given(key=st.integers(0, 2**62), length=st.integers(1, 2**62), data=st.data())
def test_a_part_is_that_of_the_whole_at_any_length(key, length, data):
    positions = np.unique(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20)))
    one = KeyedPermutation(key, length=length)
    found = one(positions)
    assert ((found >= 0) & (found < length)).all()
    assert len(set(found.tolist())) == len(positions)
    assert [int(one(positions[i : i + 1])[0]) for i in range(len(positions))] == found.tolist()


def test_it_stays_the_same_in_coming_versions():
    assert KeyedPermutation(5, "order", 2, length=10**8)(np.arange(4)).tolist() == [
        75968723,
        24260603,
        80945474,
        21096175,
    ]


def test_positions_are_not_changed():
    positions = np.arange(10)
    KeyedPermutation(0, length=10)(positions)
    assert positions.tolist() == list(range(10))


def test_where_a_number_goes_is_uniform_over_positions_and_keys():
    counts = np.zeros((50, 50))
    for key in range(100):
        found = permutation(key)
        np.add.at(counts, (np.arange(LENGTH) * 50 // LENGTH, found * 50 // LENGTH), 1)
    sizes = np.bincount(np.arange(LENGTH) * 50 // LENGTH)
    # Of a permutation rows and columns are fixed sums, so that 49 x 49 of the counts are free.
    expected = 100 * np.outer(sizes, sizes) / LENGTH
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 49**2) < 5 * np.sqrt(2 * 49**2)


@pytest.mark.parametrize("distance", [1, 2, 32, 265, 4096])
def test_what_is_near_does_not_stay_near(distance):
    # 265 is the width of the network's halves: the distance at which a weak one would show itself.
    for key in range(5):
        found = permutation(key)
        steps = (found[distance:] - found[:-distance]) % LENGTH
        assert is_uniform(np.bincount(steps * 200 // LENGTH, minlength=200), len(steps) / 200)


def test_a_batch_is_like_independent_draws():
    # Which of 16 ranges the samples of a batch of 32 come from: as even, and as uneven, as chance makes it.
    batches = (permutation(7)[: LENGTH // 32 * 32] * 16 // LENGTH).reshape(-1, 32)
    counts = np.stack([(batches == part).sum(1) for part in range(16)])
    variance = 32 * (1 / 16) * (15 / 16)
    assert abs(counts.mean() - 2) < 0.001
    assert abs(counts.var() / variance - 1) < 0.05


def test_epochs_have_nothing_to_do_with_each_other():
    orders = [permutation(key) for key in range(10)]
    matrix = np.corrcoef([*orders, np.arange(LENGTH)])
    assert (np.abs(matrix - np.eye(11)) < 5 / np.sqrt(LENGTH)).all()


def test_as_many_numbers_stay_where_they_were_as_in_a_random_permutation():
    numbers = np.arange(1000)
    stayed = [(permutation(key, 1000) == numbers).sum() for key in range(400)]
    followed = [(np.diff(permutation(key, 1000)) == 1).sum() for key in range(400)]
    for counts in (stayed, followed):  # both of mean 1 and variance 1
        assert abs(np.mean(counts) - 1) < 5 / np.sqrt(400)
        assert abs(np.var(counts) - 1) < 0.5


def test_short_ones_send_every_number_everywhere():
    counts = np.zeros((7, 7))
    for key in range(2000):
        counts[np.arange(7), permutation(key, 7)] += 1
    assert is_uniform(counts.reshape(-1), 2000 / 7)
