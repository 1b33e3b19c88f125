import random
import time
from functools import partial

import numpy as np
import pytest
import torch

from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.probe import first_shape, probe_dataset
from ksuit_runner.data.tensor_dataset import TensorDataset


class Items(list):
    """A list of samples as a dataset; a list has all that it takes."""

    collate_fn = staticmethod(lambda samples: samples)


class Noise:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.rand(2), np.random.random(), random.random()


def digest(dataset):
    return probe_dataset(dataset, 2).digest


def tensors(inputs):
    return TensorDataset(inputs, torch.zeros(len(inputs)), output_shape=(1,))


def test_same_data_same_digest():
    assert digest(tensors(torch.arange(100))) == digest(tensors(torch.arange(100)))
    assert len(digest(tensors(torch.arange(100)))) == 16


def test_length_values_dtype_and_class_count():
    datasets = [
        tensors(torch.arange(100)),
        tensors(torch.arange(101)),
        tensors(torch.arange(100) + 1),
        tensors(torch.arange(100).float()),
        Items(range(100)),
    ]
    assert len({digest(dataset) for dataset in datasets}) == len(datasets)


SAMPLES = [
    {"a": 1},
    {"b": 1},
    {"a": 1.0},
    [1, [2, 3]],
    [[1, 2], 3],
    "text",
    b"text",
    None,
    np.float32(1),
    np.zeros(2),
    np.zeros((2, 1)),
    np.array([{"a": 1}, None]),
    np.array([{"a": 2}, None]),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.float16),
    torch.zeros(1, 2, dtype=torch.float16),
    torch.zeros(()),
    torch.tensor(True),
    torch.zeros(2, dtype=torch.complex64),
    torch.arange(6).reshape(2, 3),
    torch.arange(6).reshape(2, 3).T,
]


def test_samples_of_any_kind_are_distinguished():
    assert len({digest(Items([sample])) for sample in SAMPLES}) == len(SAMPLES)


def test_objects_count_by_class_and_not_by_address():
    class Thing: ...

    assert digest(Items([Thing()])) == digest(Items([Thing()])) != digest(Items([object()]))


def test_random_samples_have_a_digest_and_disturb_no_generator():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(()), np.random.random(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert digest(Noise()) == digest(Noise())
    assert (torch.rand(()), np.random.random(), random.random()) == expected


@pytest.mark.parametrize(
    ("sample", "shape"),
    [
        (torch.zeros(3, 4), (3, 4)),
        ((torch.zeros(3, 4), 1), (3, 4)),
        ({"x": np.zeros((2, 2)), "y": 0}, (2, 2)),
        (({"x": [torch.zeros(5)]}, 1), (5,)),
        (1.0, ()),
    ],
)
def test_first_shape_is_that_of_the_first_element(sample, shape):
    class One:
        def __getitem__(self, index):
            return sample

    assert first_shape(One(), batch_size=4) == shape


def test_samples_without_a_tensor_have_no_shape():
    assert first_shape(Items(["text"]), batch_size=1) is None


class Data:
    """Points with noise of some kind; the number of samples that are collated has to be even."""

    input_shape = output_shape = (4,)

    def __init__(self, noise=lambda: torch.rand(()).item(), collated=lambda: 0.0, form=torch.tensor):
        self.noise, self.collated, self.form = noise, collated, form

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.form([index + self.noise()] * 4)

    def collate_fn(self, samples):
        assert len(samples) % 2 == 0, "an even number is needed"
        return torch.stack(samples) + self.collated()


class Whole(Data):
    """Returns finished batches, of one size only."""

    __getitem__ = None

    def __getitems__(self, indices):
        assert len(indices) == 6
        return torch.stack([Data.__getitem__(self, index) for index in indices])


class Triplets(Data):
    def collate_fn(self, samples):
        assert len(samples) % 3 == 0
        return torch.stack(samples) + self.collated()


class Point:
    def __init__(self, values):
        self.values = values


def counts():
    numbers = iter(range(10**6))
    return lambda: next(numbers)


OWN = {
    "numpy": lambda: np.random.default_rng(0).random,
    "numpy's old one": lambda: np.random.RandomState(0).rand,
    "python": lambda: random.Random(0).random,
    "torch": lambda: partial(torch.rand, (), generator=torch.Generator().manual_seed(0)),
    "a counter": counts,
    "the time": lambda: lambda: time.perf_counter_ns() % 1000,
}


def warned(caplog, dataset):
    caplog.clear()
    DataContainer({"train": dataset}, 6, seed=0).check_repeatable()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", OWN)
def test_a_dataset_with_a_generator_or_counter_of_its_own_is_warned_of(caplog, kind):
    own = OWN[kind]
    for dataset in (Data(own()), Data(collated=own()), Data(own(), form=Point), Whole(own()), Triplets(collated=own())):
        (text,) = warned(caplog, dataset)
        assert f"data.datasets.train: a {type(dataset).__name__} returns other data when the same samples" in text


SEEDED = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": np.random.rand,
    "python": random.random,
    "derived": lambda: np.random.default_rng(np.random.randint(2**31)).random(),
}


@pytest.mark.parametrize("kind", SEEDED)
def test_seeded_generators_are_not_warned_of(caplog, kind):
    noise = SEEDED[kind]
    for dataset in (Data(noise, noise), Data(noise, form=Point), Whole(noise), Triplets(noise, noise)):
        assert warned(caplog, dataset) == []


@pytest.mark.parametrize("kind", [Data, Whole, Triplets])
def test_a_dataset_that_needs_more_samples_at_once_can_be_used(monkeypatch, kind):
    monkeypatch.setattr(Data, "input_shape", None)
    data = DataContainer({"train": kind()}, 6, seed=0)
    assert data.input_shape == (4,)
    assert len(data.describe()["train"]["digest"]) == 16


def test_a_dataset_that_fails_has_a_digest_and_says_why_when_it_is_used():
    class Broken(Data):
        def __getitem__(self, index):
            raise KeyError("columns")

    data = DataContainer({"train": Broken()}, 6, seed=0)
    data.check_repeatable()
    assert data.describe() == DataContainer({"train": Broken()}, 6, seed=0).describe()
    with pytest.raises(KeyError, match="columns") as raised:
        next(data.evaluation_batches("train"))
    assert raised.value.__notes__ == ["raised by data.datasets.train, in batch 0 of an evaluation"]
