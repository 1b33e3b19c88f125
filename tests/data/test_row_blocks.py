"""Small batches that are fetched several at a time: nobody but a clock can tell."""

import os
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest, PartSpan, fetch_batch
from ksuit_runner.data.row_blocks import gathers_rows
from ksuit_runner.data.stream import LocalStream
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import Interrupted
from ksuit_runner.system.signals import catch_signals


class Counted(TensorDataset):
    """Counts its fetches, and has no sample beyond its length."""

    def __init__(self, samples: int = 400, width: int = 16) -> None:
        super().__init__(torch.randn(samples, width), torch.arange(samples), (10,))
        self.fetches: list[int] = []

    @gathers_rows
    def __getitems__(self, indices):
        self.fetches.append(len(indices))
        return super().__getitems__(indices)


class Scaled(Counted):
    """Overrides the function without the mark."""

    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        return inputs * 2, targets


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


class Shaped(Counted):
    """Returns something else than a tuple of rows, against its mark."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.shape = shape

    @gathers_rows
    def __getitems__(self, indices):
        return self.shape(*super().__getitems__(indices))


def request(batch: int, size: int = 8, start: int | None = None, epoch: int = 1, parts: int = 1) -> BatchRequest:
    start = batch * 8 if start is None else start
    indices = np.arange(start, start + size)[::-1]
    if epoch == EVALUATION:
        return BatchRequest("x", epoch, batch, indices, begins=True)
    spans = tuple(PartSpan(part, size * part // parts, size * (part + 1) // parts) for part in range(parts))
    return BatchRequest("x", epoch, batch, indices, parts, spans)


def taken(dataset, requests):
    stream = LocalStream({"x": dataset}, 0, requests)
    return [stream.take() for _ in requests]


REQUESTS = (*map(request, range(20)), request(20, size=3), request(0, epoch=2), request(0, 30, epoch=EVALUATION))


def test_batches_are_those_that_are_fetched_one_by_one():
    dataset = Counted()
    found = taken(dataset, REQUESTS)
    assert len(dataset.fetches) < 8
    expected = [fetch_batch({"x": dataset}, 0, item) for item in REQUESTS]
    assert_close(found, expected, rtol=0, atol=0)
    assert all(tensor.data_ptr() % 64 == 0 for [batch] in found[:-1] for tensor in batch)
    assert type(found[0][0]) is type(expected[0][0])


def test_large_batches_and_blocks_end_somewhere():
    dataset = Counted(samples=8 * 400, width=64)
    taken(dataset, [request(number) for number in range(400)])
    assert max(dataset.fetches) * (64 * 4 + 8) <= 1 << 18
    large = Counted(samples=3600, width=64)
    taken(large, [request(number, size=1200, start=1200 * number) for number in range(3)])
    assert set(large.fetches) == {1200}


@pytest.mark.parametrize(
    ("dataset", "requests"),
    [
        (Counted(width=3), [request(number, size=7, start=7 * number) for number in range(9)]),  # 84 bytes
        (Scaled(), [request(number) for number in range(9)]),
        (Counted(), [request(number, parts=2) for number in range(9)]),
        (Shaped(Pair), [request(number) for number in range(9)]),
        (Shaped(lambda inputs, targets: {"inputs": inputs}), [request(number) for number in range(9)]),
        (Shaped(lambda *rows: tuple(item.repeat_interleave(2, 0) for item in rows)), [request(n) for n in range(9)]),
    ],
    ids=[
        *("rows that would not be aligned", "a function without the mark", "batches in parts"),
        *("a named tuple", "a dictionary", "more rows than samples"),
    ],
)
def test_others_are_fetched_one_by_one(dataset, requests):
    found = taken(dataset, requests)
    assert max(dataset.fetches) <= 8
    expected = [fetch_batch({"x": dataset}, 0, item) for item in requests]
    assert_close(found, expected, rtol=0, atol=0)
    assert type(found[0][0]) is type(expected[0][0])


def test_data_that_is_learned_has_a_graph_for_each_batch():
    dataset = Counted()
    dataset.inputs.requires_grad_()
    for [(inputs, _)] in taken(dataset, REQUESTS[:3]):
        inputs.square().sum().backward()
    assert torch.equal(dataset.inputs.grad[:24], 2 * dataset.inputs[:24])


def test_a_batch_that_is_changed_in_place_is_nothing_to_the_others():
    dataset, shift = Counted(), nn.Parameter(torch.ones(16))
    [[(first, _)], [(second, _)], *_] = taken(dataset, REQUESTS)
    kept, before = (second * shift).sum(), second.clone()
    first.add_(shift)
    first.sum().backward()
    kept.backward()
    assert first.requires_grad and not second.requires_grad
    assert torch.equal(second, before) and torch.equal(shift.grad, 8 * torch.ones(16) + before.sum(0))


def test_an_error_comes_with_its_own_batch():
    stream = LocalStream({"x": Counted(samples=30)}, 0, [request(number) for number in range(5)])
    for number in range(3):
        [(_, targets)] = stream.take()
        assert isinstance(targets, Tensor) and targets[-1] == 8 * number
    with pytest.raises(IndexError):
        stream.take()
    assert stream.head is not None and stream.head.batch == 4


def test_an_error_of_the_plan_comes_with_its_own_batch():
    def plan():
        yield from map(request, range(5))
        raise RuntimeError("no order")

    stream = LocalStream({"x": Counted()}, 0, plan())
    for _ in range(4):
        stream.take()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no order"):
            stream.take()


class Slow(Counted):
    @gathers_rows
    def __getitems__(self, indices):
        if len(indices) > 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitems__(indices)


def slow_order():
    yield from (request(0), request(1))
    os.kill(os.getpid(), signal.SIGTERM)
    yield request(2)


@pytest.mark.parametrize(
    ("dataset", "plan"), [(Slow(), [request(number) for number in range(5)]), (Counted(), slow_order())]
)
def test_a_signal_ends_the_wait_for_batches_that_are_fetched_ahead(dataset, plan):
    with catch_signals() as interruption:
        stream = LocalStream({"x": dataset}, 0, plan)
        with pytest.raises(Interrupted):
            interruption.wait_for(stream.take)


def test_a_batch_that_is_dropped_is_none_of_those_that_are_taken():
    stream = LocalStream({"x": Counted()}, 0, [request(number) for number in range(5)])
    stream.take()
    stream.drop()
    [(_, targets)] = stream.take()
    assert targets[-1] == 8 * 2 and stream.head.batch == 3


def test_a_stream_that_is_closed_has_nothing_left():
    stream = LocalStream({"x": Counted()}, 0, [request(number) for number in range(5)])
    stream.take()
    stream.close()
    assert stream.head is None
