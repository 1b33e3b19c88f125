"""Every batch of an evaluation counts once for whoever reads it, on any number of ranks."""

from itertools import chain

import pytest
from worlds import OneOf

from ksuit_runner.data.shared_pass import Reading, SharedPass
from ksuit_runner.distributed.world import World

ALL, FEW, SHARED, SHARED_FEW = Reading(), Reading(3), Reading(None, True), Reading(3, True)
READINGS = ([ALL], [SHARED], [SHARED_FEW, SHARED], [ALL, SHARED], [FEW, SHARED], [SHARED_FEW, ALL, SHARED], [FEW, ALL])
LENGTHS = (1, 2, 3, 4, 7, 8)


def read(readings, size, batches, in_step):
    """Return for each rank what is done with its batches: (first, number, {reader: whether it counts})."""
    ranks = []
    for rank in range(size):
        shared = SharedPass(readings, OneOf(rank, size), in_step)
        turns = shared.turns(batches)
        ranks.append([(*turn, shared.readers(turn)) for turn in turns])
    return ranks


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("readings", READINGS)
def test_what_counts_are_all_batches_once(readings, size, in_step):
    for batches in LENGTHS:
        ranks = read(readings, size, batches, in_step)
        for index, (most, is_shared) in enumerate(readings):
            wanted = list(range(batches if most is None else min(most, batches)))
            counted = [[number for _, number, readers in turns if readers.get(index)] for turns in ranks]
            if is_shared:
                assert sorted(chain(*counted)) == wanted
                assert all(number % size == rank for rank, numbers in enumerate(counted) for number in numbers)
            else:
                assert counted == [wanted] * size
        for turns in ranks:
            assert [number for _, number, _ in turns] == sorted(number for _, number, _ in turns)
            assert all(readers for _, _, readers in turns)  # nothing is fetched for nobody


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("readings", READINGS)
def test_ranks_in_step_do_the_same_at_every_turn(readings, size):
    for batches in LENGTHS:
        first, *others = read(readings, size, batches, in_step=True)
        done = [(start, list(readers)) for start, _, readers in first]
        assert all([(start, list(readers)) for start, _, readers in turns] == done for turns in others)
        if all(reading.is_shared for reading in readings):
            assert len(done) == -(-min(batches, SharedPass(readings, World()).max_batches or batches) // size)


def test_of_a_stream_ranks_in_step_read_all_and_others_go_on_without_end():
    for in_step, wanted in ((True, [0, 1, 2, 3]), (False, [1, 3, 5, 7])):
        turns = SharedPass([SHARED], OneOf(1, 2), in_step).turns()
        assert [next(turns).number for _ in range(4)] == wanted
