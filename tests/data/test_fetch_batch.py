import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, default_collate

from ksuit_runner.data.collators import Collated, Mixup
from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest, PartSpan, fetch_batch
from ksuit_runner.data.stream import LocalStream
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.data.wrappers import Repeat
from ksuit_runner.errors import ConfigError


class Noise:
    """Samples that are nothing but random numbers, from all three generators."""

    def __getitem__(self, index):
        return torch.rand(()), np.random.random(), random.random()


class Squares:
    def __getitem__(self, index):
        assert type(index) is int
        return {"index": index, "square": torch.tensor([index**2])}


class ListOfSquares(Squares):
    def __getitem__(self, index):
        raise AssertionError("__getitems__ is there")

    def __getitems__(self, indices):
        return [Squares()[int(index)] for index in indices]


class Rows:
    rows = torch.arange(20).reshape(10, 2)

    def __getitems__(self, indices):
        assert isinstance(indices, np.ndarray)
        return self.rows[indices]


class Words:
    words = ("a", "list", "of", "words")

    def __getitem__(self, index):
        return self.words[index]

    @staticmethod
    def collate_fn(samples):
        return "-".join(samples)


def do_fetch(dataset, indices=(2, 0, 1), seed=0, key="train", epoch=1, batch=0):
    return fetch_batch({key: dataset}, seed, BatchRequest(key, epoch, batch, np.array(indices)))


@pytest.mark.parametrize("dataset", [Squares(), ListOfSquares(), Subset(Squares(), range(5))])
def test_samples_are_collated_in_the_order_of_the_indices(dataset):
    batch = do_fetch(dataset)
    assert batch["index"].tolist() == [2, 0, 1]
    assert batch["square"].tolist() == [[4], [0], [1]]


def test_what_getitems_returns_is_the_batch_unless_it_is_a_list():
    assert do_fetch(Rows()).tolist() == [[4, 5], [0, 1], [2, 3]]


class Shifted(TensorDataset):
    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + 100, targets


class Forwarding:
    """A proxy: what it has not itself it takes from the dataset inside, ``__getitems__`` as well."""

    def __init__(self, inside):
        self.inside = inside

    def __len__(self):
        return len(self.inside)

    def __getitem__(self, index):
        inputs, targets = self.inside[index]
        return inputs + 100, targets

    def __getattr__(self, name):
        return getattr(vars(self)["inside"], name)


class Gathering(Shifted):
    def __getitems__(self, indices):
        return [self[int(index)] for index in indices]


@pytest.mark.parametrize("kind", [Shifted, Gathering, Forwarding])
def test_a_subclass_or_proxy_that_changes_single_samples_is_not_passed_by(kind):
    tensors = torch.arange(10.0), torch.zeros(10), (1,)
    dataset = Forwarding(TensorDataset(*tensors)) if kind is Forwarding else kind(*tensors)
    for wrapped in (dataset, Repeat(dataset, times=2), Collated(dataset, default_collate)):
        assert do_fetch(wrapped)[0].tolist() == [102, 100, 101]
    updates = [BatchRequest("train", 1, batch, np.arange(2) + batch, 1, (PartSpan(0, 0, 2),)) for batch in range(3)]
    stream = LocalStream({"train": dataset}, 0, updates)
    assert [stream.take()[0][0].tolist() for _ in updates] == [[100, 101], [101, 102], [102, 103]]


def test_a_dataset_can_collate_its_own_samples():
    assert do_fetch(Words()) == "of-a-list"


def test_no_collate_fn_means_the_default_one():
    dataset = Squares()
    dataset.collate_fn = None
    assert do_fetch(dataset)["index"].tolist() == [2, 0, 1]


def values(batch):
    return torch.cat(batch).tolist()


def test_randomness_depends_on_the_position_only():
    batch = values(do_fetch(Noise()))
    torch.rand(3), np.random.random(3), random.random()
    assert values(do_fetch(Noise())) == batch


@pytest.mark.parametrize("other", [{"seed": 1}, {"key": "test"}, {"epoch": EVALUATION}, {"epoch": 2}, {"batch": 1}])
def test_randomness_of_every_position_differs(other):
    batch, other_batch = do_fetch(Noise()), do_fetch(Noise(), **other)
    for generated, other_generated in zip(batch, other_batch, strict=True):
        assert not set(generated.tolist()) & set(other_generated.tolist())


def test_sums_do_not_depend_on_the_number_of_threads():
    class Means:
        def __getitem__(self, index):
            return torch.rand(500_000).mean()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = do_fetch(Means(), range(8))
        torch.set_num_threads(4)
        assert torch.equal(do_fetch(Means(), range(8)), alone)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_is_restored_after_an_error():
    threads = torch.get_num_threads()
    with pytest.raises(IndexError):
        do_fetch(Words(), [9])
    assert torch.get_num_threads() == threads


class Rolled(TensorDataset):
    """Overrides a marked method with one that draws."""

    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        return inputs + torch.rand(()), targets


def test_a_marked_dataset_costs_no_seeding_and_a_subclass_that_draws_is_seeded_again():
    tensors = (torch.zeros(10, 2), torch.arange(10), (2,))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert do_fetch(TensorDataset(*tensors))[1].tolist() == [2, 0, 1]
    assert (torch.get_rng_state() == before).all()
    first, again = do_fetch(Rolled(*tensors)), do_fetch(Rolled(*tensors))
    assert (first[0] == again[0]).all()
    assert (first[0] != do_fetch(Rolled(*tensors), batch=1)[0]).all()


def test_an_error_that_is_explained_names_the_dataset():
    dataset = Collated([(torch.rand(2), number) for number in range(4)], Mixup(num_classes=3))
    with pytest.raises(ConfigError, match=r"^data.datasets.train: Mixup needs a class from 0 to 2"):
        fetch_batch({"train": dataset}, 0, BatchRequest("train", 1, 0, np.arange(4)))
