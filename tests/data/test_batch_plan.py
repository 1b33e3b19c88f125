import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.data import batch_plan as batch_plan_module
from ksuit_runner.data.batch_plan import LONGEST_DRAWN, BatchPlan, EpochOrder, Evaluation, evaluation_requests
from ksuit_runner.data.fetch_batch import EVALUATION
from ksuit_runner.data.order import CheckedOrder, Shuffled

LENGTHS = {"train": 10, "test": 5, "other": 2}


def make_plan(counter, evaluations=(), seed=0):
    order = Shuffled(dataset=range(LENGTHS["train"]), seed=seed)
    return BatchPlan(LENGTHS, "train", CheckedOrder(order), counter, evaluations, eval_batch_size=2)


def epoch_order(seed, epoch, length):
    return EpochOrder(seed, epoch, length).part(0, length)


def positions(plan):
    return [(request.dataset_key, request.epoch, request.batch) for request in plan]


@given(seed=st.integers(0, 2**62), epoch=st.integers(1, 10**6), length=st.integers(1, 200))
def test_an_epoch_visits_every_sample_once(seed, epoch, length):
    order = epoch_order(seed, epoch, length)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    order = epoch_order(0, 1, 100)
    np.random.seed(3)
    assert (order == epoch_order(0, 1, 100)).all()
    assert (order != epoch_order(0, 2, 100)).any()
    assert (order != epoch_order(1, 1, 100)).any()


def test_order_stays_the_same_in_coming_versions():
    assert epoch_order(5, 2, 10).tolist() == [0, 9, 2, 8, 4, 6, 1, 5, 3, 7]
    assert [epoch_order(seed, 1, 5).tolist() for seed in range(4)] == [
        *([1, 4, 0, 2, 3], [1, 2, 0, 4, 3], [4, 3, 2, 0, 1], [3, 2, 1, 4, 0])
    ]
    assert epoch_order(0, 1, 65_536)[:4].tolist() == [62200, 11924, 56915, 44374]
    assert LONGEST_DRAWN == 65_536  # the orders of datasets around this length would be others


LONG = LONGEST_DRAWN + 1


@pytest.mark.parametrize("length", [LONGEST_DRAWN, LONG])
def test_drawn_and_computed_orders_visit_every_sample_once(length):
    order = epoch_order(1, 2, length)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(length)).all()
    assert (order != epoch_order(1, 3, length)).mean() > 0.99


@given(start=st.integers(0, LONG), size=st.integers(0, 20_000))
def test_a_part_is_that_of_the_whole_wherever_one_begins(start, size):
    whole = epoch_order(4, 1, LONG)
    order = EpochOrder(4, 1, LONG)
    assert (order.part(start, start + size) == whole[start : start + size]).all()
    assert (order.part(5, 12) == whole[5:12]).all()  # back again


def test_a_long_order_is_computed_a_block_at_a_time():
    order, computed = EpochOrder(0, 1, 10**6), []
    permutation = order._permutation
    order._permutation = lambda positions: computed.append(len(positions)) or permutation(positions)
    for start in range(0, 16_384, 64):
        order.part(start, start + 64)
    assert computed == [8192, 8192]
    order.part(10**6 - 70, 10**6 + 5)
    assert computed[2:] == [70]


def test_an_order_takes_no_more_memory_for_more_samples():
    tracemalloc.start()
    order = EpochOrder(0, 1, 10**12)
    for start in (0, 10**11, 10**12 - 64):
        assert len(order.part(start, start + 64)) == 64
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


def test_drawing_an_order_leaves_the_global_generator_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    epoch_order(0, 1, 100)
    assert np.random.random() == expected


def test_evaluation_is_sequential_and_keeps_the_last_batch():
    fetches = list(evaluation_requests("test", 5, 2))
    assert [fetch.indices.tolist() for fetch in fetches] == [[0, 1], [2, 3], [4]]
    assert positions(fetches) == [("test", EVALUATION, batch) for batch in range(3)]


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_sizes_of_an_epochs_batches(drop_last, sizes):
    counter = UpdateCounter(10, 4, drop_last, max_epochs=2)
    fetches = list(make_plan(counter))
    assert [len(fetch.indices) for fetch in fetches] == sizes * 2
    samples = [set(np.concatenate([f.indices for f in fetches if f.epoch == epoch]).tolist()) for epoch in (1, 2)]
    assert [len(seen) for seen in samples] == [counter.samples_per_epoch] * 2


@given(start=st.integers(0, 7), drop_last=st.booleans())
def test_a_plan_from_any_update_is_the_tail_of_the_whole(start, drop_last):
    counter = UpdateCounter(10, 3, drop_last, max_updates=7)
    evaluations = [Evaluation(Interval(every_n_updates=2), "test"), Evaluation(Interval(every_n_samples=7), "other")]
    whole = list(make_plan(counter, evaluations))
    counter.update = start
    tail = list(make_plan(counter, evaluations))
    assert positions(tail) == positions(whole)[len(whole) - len(tail) :]
    assert all((a.indices == b.indices).all() for a, b in zip(tail[::-1], whole[::-1], strict=False))
    assert sum(fetch.epoch != EVALUATION for fetch in tail) == 7 - start


def test_evaluations_follow_the_update_after_which_they_are_due():
    counter = UpdateCounter(10, 5, max_updates=4)
    plan = make_plan(
        counter, [Evaluation(Interval(every_n_updates=3), "other"), Evaluation(Interval(every_n_epochs=2), "test")]
    )
    assert [key for key, _, _ in positions(plan)] == ["train"] * 3 + ["other"] + ["train"] + ["test"] * 3


def test_evaluations_by_epoch_come_last_as_their_hook_does():
    counter = UpdateCounter(10, 5, max_updates=2)
    evaluations = [Evaluation(Interval(every_n_epochs=1), "test"), Evaluation(Interval(every_n_samples=10), "other")]
    assert [key for key, _, _ in positions(make_plan(counter, evaluations))] == ["train"] * 2 + ["other"] + ["test"] * 3


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(batch_plan_module, "_draw", lambda key, length: drawn.append(length) or np.arange(length))
    list(make_plan(UpdateCounter(10, 2, max_epochs=3)))
    assert drawn == [10, 10, 10]


def test_a_plan_is_lazy():
    counter = UpdateCounter(10, 5, max_updates=10**12)
    assert len(list(islice(make_plan(counter), 3))) == 3


def test_a_plan_keeps_the_position_it_was_made_at():
    counter = UpdateCounter(10, 5, max_updates=4)
    plan = make_plan(counter)
    counter.update = 3
    assert len(list(plan)) == 4
