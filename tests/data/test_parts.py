"""The batch of an update comes in parts, each rank fetches its own, and together they are those of a single process."""

import random
from itertools import chain, count

import numpy as np
import pytest
import torch
from test_iterable_source import KINDS, listed, make
from worlds import OneOf

from ksuit_runner.counter import Interval
from ksuit_runner.data.batch_plan import Evaluation, cut
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.world import World

PARTS = 4
RANKS = pytest.mark.parametrize("size", [1, 2, 4])


class Noisy:
    """Returns its indices beside what it draws, in samples and in the collate function."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return index, torch.rand(()).item() + np.random.random() + random.random()

    def collate_fn(self, samples):
        return [list(sample) for sample in samples], torch.rand(()).item()


def container(world, num_workers=0, **kwargs):
    return DataContainer(
        {"train": Noisy(), "test": list(range(11))}, 8, 3, world=world, num_workers=num_workers, **kwargs
    )


def parts_of(data, updates, start=0, **options):
    """Return the parts of some updates, with their numbers, as plain values."""
    counter = data.new_counter(max_updates=20)
    counter.update = start
    data.open(counter, **options)
    found = [
        [(part.number, part.samples, part.batch) for part in data.next_training_batch()] for _ in range(start, updates)
    ]
    data.close()
    return found


def test_a_batch_is_cut_into_parts_that_are_as_even_as_possible():
    assert cut(10, 4, range(4)) == (0, 10, ((0, 0, 2), (1, 2, 5), (2, 5, 7), (3, 7, 10)))
    assert cut(10, 4, range(2, 4)) == (5, 10, ((2, 0, 2), (3, 2, 5)))
    assert cut(2, 4, range(4)) == (0, 2, ((1, 0, 1), (3, 1, 2)))
    assert cut(2, 4, range(1)) == (0, 0, ())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_have_the_parts_of_a_single_process(num_workers):
    whole = parts_of(container(World(), drop_last=False), 6, parts=PARTS)
    assert [[samples for _, samples, _ in parts] for parts in whole] == [[2, 2, 2, 2], [2, 2, 2, 2], [1, 2, 1, 2]] * 2
    assert len({repr(batch) for parts in whole for _, _, batch in parts}) == 24
    for size in (2, 4):
        ranks = [
            parts_of(container(OneOf(rank, size), num_workers, drop_last=False), 6, 1, parts=PARTS)
            for rank in range(size)
        ]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole[1:]


def test_what_is_drawn_belongs_to_the_part_and_the_samples_to_the_batch():
    one, four = (parts_of(container(World()), 3, parts=parts) for parts in (1, 4))
    for [(_, _, (samples, _))], parts in zip(one, four, strict=True):
        assert [index for index, _ in samples] == [index for _, _, (part, _) in parts for index, _ in part]
    assert one[0][0][2][0][0] != four[0][0][2][0][0]


def test_a_batch_with_fewer_samples_than_parts_leaves_some_of_them_out():
    data = DataContainer({"train": list(range(10))}, 8, 3, drop_last=False, world=OneOf(0, 4))
    assert [len(parts) for parts in parts_of(data, 2, parts=8)] == [2, 0]
    data = DataContainer({"train": list(range(10))}, 8, 3, drop_last=False, world=OneOf(3, 4))
    assert [[number for number, _, _ in parts] for parts in parts_of(data, 2, parts=8)] == [[6, 7], [7]]


@pytest.mark.parametrize("samples_per_epoch", [None, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_read_their_parts_of_a_stream_and_resume_in_its_middle(bits, kind, samples_per_epoch):
    def read(world, updates, start=0, state=None, num_workers=0):
        data = make(kind, num_workers, batch_size=5, samples_per_epoch=samples_per_epoch, world=world)
        if state is not None:
            data.load_state_dict(state, start)
        found = parts_of(data, updates, start, parts=PARTS)
        plain = [[(number, samples, listed(batch)) for number, samples, batch in parts] for parts in found]
        return plain, data.state_dict(updates)

    whole, _ = read(World(), 6)
    assert [[samples for _, samples, _ in parts] for parts in whole] == [[1, 1, 1, 2]] * 6
    for size in (2, 4):
        states = [read(OneOf(rank, size), 3)[1] for rank in range(size)]
        assert bits(states) == bits([read(World(), 3)[1]] * size)
        for start, num_workers in ((0, 0), (3, 2)):
            state = states[0] if start else None
            ranks = [read(OneOf(rank, size), 6, start, state, num_workers)[0] for rank in range(size)]
            found = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
            if kind == "plain":  # it says where it was read
                found, wanted = ([[part[:2] for part in parts] for parts in found] for found in (found, whole[start:]))
                assert found == wanted
            else:
                assert found == whole[start:]


# Evaluations


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [2, 5])
@RANKS
def test_ranks_share_the_batches_of_an_evaluation_announced_or_not(size, batch_size, num_workers):
    whole = list(container(World()).evaluation_batches("test", batch_size))
    whole = [batch.tolist() for batch in whole]
    for rank in range(size):
        data = container(OneOf(rank, size), num_workers)
        once = Interval(every_n_updates=1)
        shared = Evaluation(once, "test", batch_size, is_shared=True)
        counter = data.new_counter(max_updates=3)
        data.open(counter, [shared, Evaluation(once, "test", batch_size), shared])
        for number in range(3):
            data.next_training_batch()
            if number == 1:  # one that ends early, and one that nobody has announced
                next(data.evaluation_batches("test", batch_size, numbers=range(rank, len(whole), size)), None)
                next(data.evaluation_batches("test", batch_size, max_batches=3), None)
            for share in (True, False, True)[number:]:
                numbers = range(rank, len(whole), size) if share else None
                found = [batch.tolist() for batch in data.evaluation_batches("test", batch_size, numbers=numbers)]
                assert found == (whole[rank::size] if share else whole)
        data.close()


@RANKS
def test_ranks_share_the_batches_of_a_stream(size):
    whole = [listed(batch) for batch in make("plain").evaluation_batches("test")]
    for rank in range(size):
        data = make("plain", world=OneOf(rank, size))
        found = [listed(batch) for batch in data.evaluation_batches("test", numbers=count(rank, size))]
        assert found == whole[rank::size]
        assert not list(data.evaluation_batches("test", numbers=()))
