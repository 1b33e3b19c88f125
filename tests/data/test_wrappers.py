import pickle
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.data.wrappers import Cached, ClassSubset, Concatenated, Fold, Repeat, Subset, Transform
from ksuit_runner.errors import ConfigError

NUMBERS = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10) % 3, output_shape=(3,))
Sample = namedtuple("Sample", "x y")


class Noisy:
    """Samples that are drawn, and counted."""

    def __init__(self):
        self.fetched = []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.fetched.append(index)
        return torch.rand(3) + np.random.random()


def inputs(dataset):
    """Return the inputs as one sample after the other, and check that a batch has the same."""
    batch = dataset.__getitems__(np.arange(len(dataset)))
    rows = torch.stack([x for x, _ in batch]) if isinstance(batch, list) else batch[0]
    singles = [dataset[index][0] for index in range(len(dataset))]
    assert torch.equal(rows, torch.stack(singles))
    return rows.flatten().tolist()


def test_folds_divide_a_dataset_and_share_its_classes_if_asked():
    folds = [inputs(Fold(NUMBERS, "fold", fold, folds=3)) for fold in range(3)]
    assert sorted(x for part in folds for x in part) == [*range(10)] and sorted(map(len, folds)) == [3, 3, 4]
    for fold, part in enumerate(folds):
        assert inputs(Fold(NUMBERS, "rest", fold, folds=3)) == [x for x in range(10) if x not in part]
    assert folds != [inputs(Fold(NUMBERS, "fold", fold, folds=3, seed=1)) for fold in range(3)]
    for seed in range(5):
        stratified = Fold(Subset(NUMBERS, stop=9), "fold", 1, folds=3, seed=seed, stratify="targets")
        assert sorted(x % 3 for x in inputs(stratified)) == [0, 1, 2]


@pytest.mark.parametrize(("fold", "folds"), [(0, 1), (0, 11), (3, 3), (-1, 3)])
def test_a_fold_that_cannot_be_is_refused(fold, folds):
    with pytest.raises(ConfigError, match="fold"):
        Fold(NUMBERS, "fold", fold, folds)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Subset(NUMBERS, indices=[7, 1, 1]), [7, 1, 1]),
        (Subset(NUMBERS, start=-2), [8, 9]),
        (Subset(NUMBERS, start=1, stop=3), [1, 2]),
        (Subset(NUMBERS, start=0.25, stop=0.5), [2, 3, 4]),
        (ClassSubset(NUMBERS, [0, 2]), [0, 2, 3, 5, 6, 8, 9]),
        (Repeat(Subset(NUMBERS, stop=2), times=2), [0, 1, 0, 1]),
        (Repeat(Subset(NUMBERS, stop=2), times=1.5), [0, 1, 0]),
        (Transform(Subset(NUMBERS, stop=2), lambda x: x + 10), [10, 11]),
        (Cached(Subset(NUMBERS, stop=2)), [0, 1]),
        (Concatenated({"a": Subset(NUMBERS, stop=2), "b": NUMBERS}), [0, 1, *range(10)]),
        (Subset(Concatenated({"a": NUMBERS, "b": NUMBERS}), start=9, stop=12), [9, 0, 1]),
    ],
)
def test_the_samples_and_shapes_of_wrappers(dataset, expected):
    assert inputs(dataset) == expected
    assert dataset.output_shape == (3,)
    assert DataContainer({"train": dataset}, 1, seed=0).input_shape == (1,)
    assert len(dataset.per_sample("targets")) == len(dataset)
    if not isinstance(dataset, Transform):
        assert pickle.loads(pickle.dumps(dataset)).input_shape == (1,)
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_the_columns_of_a_table_are_entries_for_each_sample():
    class Table:
        column_names = ("label",)

        def __getitem__(self, key):
            return [5, 6, 5] if key == "label" else {"label": 5}

        def __len__(self):
            return 3

    assert ClassSubset(Table(), [5], labels="label").per_sample("label").tolist() == [5, 5]


def test_a_whole_batch_stays_a_whole_batch():
    x, y = Subset(NUMBERS, start=5).__getitems__(np.array([0, 2]))
    assert (x.flatten().tolist(), y.tolist()) == ([5, 7], [2, 1])


def test_a_transform_changes_a_part_of_a_sample():
    def changed(sample, part):
        return Transform([sample], lambda value: -value if part is not None else "whole", part)[0]

    assert changed((1, 2), 0) == (-1, 2)
    assert changed([1, 2], 1) == [1, -2]
    assert changed({"x": 1, "y": 2}, "y") == {"x": 1, "y": -2}
    assert changed(Sample(1, 2), 0) == Sample(-1, 2)
    assert changed((1, 2), None) == "whole"
    resized = Transform(NUMBERS, lambda x: x.expand(5))
    assert DataContainer({"train": Subset(resized, stop=3)}, 2, seed=0).input_shape == (5,)


def test_cached_samples_are_the_same_whenever_they_are_fetched_first():
    inner, cached, other = Noisy(), Cached(Noisy()), Cached(Noisy())
    torch.manual_seed(0)
    first = [cached[index] for index in (2, 0, 2)]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0)), "nothing was drawn here"
    torch.manual_seed(5)
    assert torch.equal(other[0], first[1]) and torch.equal(other[2], first[0])
    assert cached.dataset.fetched == [2, 0] and not torch.equal(first[0], first[1])
    assert inner.fetched == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subset(NUMBERS, indices=[1], stop=3), "either indices, or start and stop"),
        (lambda: Subset(NUMBERS, indices=[10]), "there is no sample 10 among 10"),
        (lambda: Subset(NUMBERS, start=10), "no sample of 10 is left"),
        (lambda: Subset(NUMBERS, stop=1.5), "stop: a fraction must be between 0 and 1"),
        (lambda: ClassSubset(NUMBERS, [4]), "there is no sample of class 4"),
        (lambda: ClassSubset(NUMBERS, [1], labels="classes"), "has no attribute 'classes'"),
        (lambda: Repeat(NUMBERS, 0), "times: must be above 0"),
        (lambda: Repeat(NUMBERS, float("inf")), "times: must be above 0"),
        (lambda: Subset(iter(range(3)), stop=2), "Subset needs a dataset with __len__, not a range_iterator"),
        (lambda: Concatenated({}), "at least one is needed"),
        (lambda: ClassSubset(Subset(SimpleRange(), stop=2), [1]), "'targets' of a SimpleRange has 2 entries"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class SimpleRange(SimpleNamespace):
    targets = (1, 2)

    def __len__(self):
        return 3
