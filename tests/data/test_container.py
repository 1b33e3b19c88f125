import random

import numpy as np
import pytest
import torch

from ksuit_runner.counter import Interval
from ksuit_runner.data.batch_plan import Evaluation
from ksuit_runner.data.container import DataContainer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with a single core

WORKERS = pytest.mark.parametrize("num_workers", [0, 1, 2])


class Augmented:
    """Index, and noise from every generator that an augmentation may use."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"index": index, "noise": torch.rand(2) + np.random.random() + random.random()}


class Broken(Augmented):
    def __getitem__(self, index):
        if index == 3:
            raise ZeroDivisionError("sample 3 is broken")
        return super().__getitem__(index)


def make_container(num_workers=0, **kwargs):
    datasets = {"train": Augmented(10), "test": Augmented(5), "other": Augmented(3)}
    return DataContainer(**{"datasets": datasets, "batch_size": 3, "seed": 0, "num_workers": num_workers} | kwargs)


def listed(batch):
    return batch["index"].tolist(), batch["noise"].tolist()


def evaluate(container, key="test"):
    return [listed(batch) for batch in container.evaluation_batches(key)]


@pytest.fixture
def opened():
    containers = []

    def open_container(num_workers=0, start=0, evaluations=(), max_updates=8, **kwargs):
        container = make_container(num_workers, **kwargs)
        counter = container.new_counter(max_updates=max_updates)
        counter.update = start
        container.open(counter, evaluations)
        containers.append(container)
        return container

    yield open_container
    for container in containers:
        container.close()


def train(container, updates):
    return [listed(container.next_training_batch()[0].batch) for _ in range(updates)]


# Training


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_the_same_with_any_number_of_workers(opened, drop_last):
    runs = [train(opened(num_workers, drop_last=drop_last), 8) for num_workers in (0, 1, 2)]
    assert runs[0] == runs[1] == runs[2]
    assert len({str(noise) for _, noise in runs[0]}) == 8


@WORKERS
@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_run_can_start_at_any_update(opened, num_workers, start):
    whole = train(opened(), 8)
    assert train(opened(num_workers, start=start), 8 - start) == whole[start:]


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [3, 3, 3]), (False, [3, 3, 3, 1])])
def test_an_epoch_sees_every_sample_once(opened, drop_last, sizes):
    container = opened(drop_last=drop_last)
    epochs = [[indices for indices, _ in train(container, len(sizes))] for _ in range(2)]
    for epoch in epochs:
        assert [len(indices) for indices in epoch] == sizes
        assert len({index for indices in epoch for index in indices}) == sum(sizes)
    assert epochs[0] != epochs[1]


def test_another_seed_is_another_order(opened):
    assert train(opened(seed=1), 3) != train(opened(seed=0), 3)


@WORKERS
def test_after_the_last_update_there_is_nothing(opened, num_workers):
    container = opened(num_workers, max_updates=2)
    train(container, 2)
    with pytest.raises(StopIteration):
        container.next_training_batch()


@WORKERS
def test_nothing_left_to_do(opened, num_workers):
    with pytest.raises(StopIteration):
        opened(num_workers, start=8).next_training_batch()


@WORKERS
def test_reopening_starts_over(opened, num_workers):
    container = opened(num_workers)
    first = train(container, 4)
    container.open(container.new_counter(max_updates=4))
    assert train(container, 4) == first


def test_waiting_is_counted_until_it_is_asked_for(opened):
    container = opened()
    assert container.take_wait_seconds() == 0
    train(container, 2)
    assert container.take_wait_seconds() > 0
    assert container.take_wait_seconds() == 0


# Evaluation

EVALUATIONS = (Evaluation(Interval(every_n_updates=2), "test"), Evaluation(Interval(every_n_epochs=1), "other"))


@WORKERS
def test_every_evaluation_sees_the_same_data_with_or_without_a_stream(opened, num_workers):
    expected = evaluate(make_container())
    assert [indices for indices, _ in expected] == [[0, 1, 2], [3, 4]]
    container = opened(num_workers, evaluations=EVALUATIONS)
    for _ in range(2):
        train(container, 2)
        assert evaluate(container) == expected
    container.close()
    assert evaluate(container) == expected


@WORKERS
def test_evaluations_in_between_leave_training_as_it_is(opened, num_workers):
    expected = train(opened(), 8)
    container = opened(num_workers, evaluations=EVALUATIONS)
    batches = []
    for update in range(1, 9):
        batches += train(container, 1)
        if update % 2 == 0:
            assert len(evaluate(container, "test")) == 2
        if update % 3 == 0:
            assert len(evaluate(container, "other")) == 1
    assert batches == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_planned_evaluation_is_fetched_by_the_workers(opened, num_workers):
    class Where(Augmented):
        def __getitem__(self, index):
            return torch.utils.data.get_worker_info() is not None

    datasets = {"train": Where(9), "test": Where(4)}
    container = opened(num_workers, datasets=datasets, evaluations=[Evaluation(Interval(every_n_updates=2), "test")])

    def in_worker():
        return [value for batch in container.evaluation_batches("test") for value in batch.tolist()]

    container.next_training_batch()
    assert in_worker() == [False] * 4  # nobody planned it here
    container.next_training_batch()
    assert in_worker() == [True] * 4
    assert in_worker() == [False] * 4  # once more: it was planned only once


@WORKERS
def test_an_unplanned_evaluation_leaves_the_stream_alone(opened, num_workers):
    expected, expected_test = train(opened(), 8), evaluate(make_container())
    container = opened(num_workers, evaluations=EVALUATIONS)
    batches = train(container, 1)
    assert evaluate(container) == expected_test
    batches += train(container, 1)
    assert evaluate(container, "other") == evaluate(make_container(), "other")
    assert evaluate(container) == expected_test
    assert batches + train(container, 6) == expected


@WORKERS
def test_evaluations_that_are_skipped_or_end_early(opened, num_workers):
    expected, expected_test = train(opened(), 8), evaluate(make_container())
    container = opened(num_workers, evaluations=[*EVALUATIONS, Evaluation(Interval(every_n_updates=2), "test")])
    batches = train(container, 4)  # leaves out three
    assert listed(next(container.evaluation_batches("test"))) == expected_test[0]
    assert evaluate(container) == expected_test  # the second one of this update
    batches += train(container, 2)
    next(container.evaluation_batches("test"))
    assert batches + train(container, 2) == expected


@WORKERS
def test_evaluations_side_by_side(opened, num_workers):
    expected = evaluate(make_container())
    container = opened(num_workers, evaluations=[Evaluation(Interval(every_n_updates=1), "test")] * 2)
    batches = train(container, 1)
    pairs = list(zip(container.evaluation_batches("test"), container.evaluation_batches("test"), strict=True))
    assert [listed(first) for first, _ in pairs] == [listed(second) for _, second in pairs] == expected
    assert batches + train(container, 7) == train(opened(), 8)


@WORKERS
def test_evaluation_that_outlives_its_update_continues(opened, num_workers):
    container = opened(num_workers, evaluations=[Evaluation(Interval(every_n_updates=1), "test")])
    train(container, 1)
    evaluation = container.evaluation_batches("test")
    seen = [listed(next(evaluation))]
    train(container, 1)
    container.close()
    assert seen + [listed(batch) for batch in evaluation] == evaluate(make_container())


@WORKERS
def test_evaluation_after_the_last_update(opened, num_workers):
    container = opened(num_workers, max_updates=1)
    train(container, 1)
    assert evaluate(container) == evaluate(make_container())


def test_evaluation_batches_have_their_own_size():
    assert [len(indices) for indices, _ in evaluate(make_container(eval_batch_size=4))] == [4, 1]


@WORKERS
def test_an_error_comes_with_its_batch_and_the_container_can_be_used_again(opened, num_workers):
    datasets = {"train": Augmented(10), "test": Broken(9), "good": Augmented(2)}
    container = opened(num_workers, datasets=datasets, evaluations=[Evaluation(Interval(every_n_updates=1), "test")])
    train(container, 1)
    batches = container.evaluation_batches("test")
    assert listed(next(batches))[0] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="sample 3 is broken") as error:
        next(batches)
    if num_workers:
        assert "in __getitem__" in str(error.value)  # the worker's traceback
    container.close()
    assert len(evaluate(container, "good")) == 1
