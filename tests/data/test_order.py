"""Orders: what they visit, and that any part is that of the whole, wherever one begins."""

from functools import partial

import numpy as np
import pytest
import torch

from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.order import (
    CheckedOrder,
    ClassBalanced,
    Mixture,
    Order,
    Repeated,
    Sequential,
    Shuffled,
    Weighted,
)
from ksuit_runner.data.wrappers import ClassSubset, Concatenated, Repeat, Subset
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.keyed_random import uses_no_rng


class Labelled:
    """Class 0 eight times as often as class 1."""

    def __init__(self, length=90):
        self.targets = torch.arange(length) % 9 == 8

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return index


class EasyFirst(Order):
    """Doubles what an epoch draws from, and draws from torch's generator."""

    is_endless = True

    def part(self, epoch, start, stop):
        return torch.randint(min(len(self.dataset), 10 * 2**epoch), (stop - start,))


MIXED = Concatenated({"small": Labelled(7), "large": Labelled(1000), "rare": Labelled(40)})
ORDERS = {
    "shuffled": (Shuffled, Labelled()),
    "sequential": (Sequential, Labelled()),
    "repeated": (partial(Repeated, times=3), Labelled()),
    "weighted": (partial(Weighted, weights="targets"), Labelled()),
    "class_balanced": (ClassBalanced, Labelled()),
    "mixture": (partial(Mixture, weights={"small": 1, "large": 0.7, "rare": 0.01}), MIXED),
    "own": (EasyFirst, Labelled()),
}


def make(name, **kwargs):
    order, dataset = ORDERS[name]
    return CheckedOrder(order(**{"dataset": dataset, "seed": 3} | kwargs))


def epoch_of(order, epoch=1):
    return np.concatenate([order.part(epoch, start, start + 8) for start in range(0, len(order), 8)])


@pytest.mark.parametrize("name", ORDERS)
def test_any_part_is_that_of_the_whole_wherever_one_begins(name):
    order, whole = make(name), {}
    for epoch in (1, 2):
        whole |= {(epoch, start): order.part(epoch, start, start + 8).tolist() for start in range(0, len(order), 8)}
    torch.manual_seed(np.random.randint(2**31))  # nothing but the position counts
    for epoch, start in list(whole)[::-5]:
        assert make(name).part(epoch, start, start + 8).tolist() == whole[epoch, start]
    assert order.part(1, len(order) - 3, len(order) + 5).shape == (3,)
    if name != "sequential":
        assert (epoch_of(order, 1) != epoch_of(order, 2)).any()
        assert (epoch_of(order) != epoch_of(make(name, seed=4))).any()


def test_drawing_in_an_order_of_ones_own_disturbs_no_generator():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    make("own").part(1, 0, 8)
    assert torch.rand(()) == expected


def test_what_the_orders_visit():
    assert epoch_of(make("sequential")).tolist() == list(range(90))
    assert sorted(epoch_of(make("shuffled"))) == list(range(90))
    repeated = epoch_of(make("repeated"))
    assert sorted(repeated[::3]) == list(range(90)) and (repeated[::3] == repeated[2::3]).all()
    ones = np.flatnonzero(Labelled().targets)
    assert set(epoch_of(make("weighted", samples_per_epoch=1000))) == set(ones)
    balanced = epoch_of(make("class_balanced", samples_per_epoch=5000))
    assert 0.47 < np.isin(balanced, ones).mean() < 0.53
    assert set(balanced) == set(range(90))


def test_a_mixture_keeps_its_shares_and_visits_each_dataset_to_its_end():
    order = make("mixture", samples_per_epoch=1000)
    visited = np.concatenate([epoch_of(order, epoch) for epoch in range(1, 12)])
    parts = [visited[(visited >= first) & (visited < last)] for first, last in ((0, 7), (7, 1007), (1007, 1047))]
    assert [len(part) for part in parts] == pytest.approx([11000 * w / 1.71 for w in (1, 0.7, 0.01)], abs=40)
    for part, size in zip(parts, (7, 1000, 40), strict=True):
        counts = np.bincount(part - part.min(), minlength=size)
        assert counts.max() - counts.min() <= 1


def test_an_epoch_may_be_shorter_and_where_samples_repeat_anyway_longer():
    assert len(make("shuffled", samples_per_epoch=10)) == 10
    assert len(make("repeated")) == 270
    assert len(make("weighted", samples_per_epoch=10**6)) == 10**6
    with pytest.raises(ConfigError, match="samples_per_epoch: 91 is more than the 90 positions of a Sequential"):
        make("sequential", samples_per_epoch=91)


def test_labels_are_found_through_wrappers():
    dataset = Repeat(Subset(Concatenated({"a": Labelled(), "b": Labelled()}), start=0.5), times=2)
    order = CheckedOrder(ClassBalanced(dataset=dataset, seed=0, samples_per_epoch=2000))
    labels = dataset.per_sample("targets")
    assert 0.45 < labels[epoch_of(order)].mean() < 0.55
    assert len(ClassSubset(dataset, [True])) == 20


class Wrong(Order):
    @uses_no_rng
    def part(self, epoch, start, stop):
        return {1: [0.5] * 8, 2: [0] * 7, 3: [90] + [0] * 7}[epoch]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_order_that_returns_something_else(epoch):
    order = CheckedOrder(Wrong(dataset=Labelled(), seed=0))
    with pytest.raises(KsuitError, match=r"data.order: Wrong.part\(.*has to return 8 whole numbers from 0 to 89, not"):
        order.part(epoch, 0, 8)


@pytest.mark.parametrize(
    ("order", "dataset", "message"),
    [
        (partial(Weighted, weights=[1, 2]), Labelled(), "weights: one for each of the 90 samples is needed, not"),
        (partial(Weighted, weights=[0.0] * 90), Labelled(), "weights: all must be finite and 0 or more"),
        (partial(Weighted, weights="scores"), Labelled(), "a Labelled has no attribute 'scores'"),
        (partial(Repeated, times=0), Labelled(), "times: a whole number of at least 1 is needed, not 0"),
        (partial(Mixture, weights={"a": 1}), Labelled(), "has to be a ksuit_runner.data.wrappers.Concatenated"),
        (partial(Mixture, weights={"smal": 1}), MIXED, "there is no dataset 'smal'. Did you mean 'small'?"),
        (partial(Mixture, weights={"small": 1, "large": 1}), MIXED, "weights: 'rare' has none"),
        (partial(Mixture, weights={"small": 1, "large": 1, "rare": 0}), MIXED, "each must be above 0"),
    ],
)
def test_mistakes_are_named_with_their_config_path(order, dataset, message):
    with pytest.raises(ConfigError, match=rf"^data.order: .*{message}"):
        DataContainer({"train": dataset}, 4, seed=0, order=order)


def test_the_container_trains_in_the_order():
    data = DataContainer({"train": Labelled()}, 4, seed=0, order=partial(Repeated, times=2), num_workers=0)
    counter = data.new_counter(max_epochs=1)
    assert counter.end_update == 45
    counter.update = 44
    data.open(counter)
    expected = Repeated(times=2, dataset=Labelled(), seed=0).part(1, 176, 180)
    assert data.next_training_batch()[0].batch.tolist() == expected.tolist()
