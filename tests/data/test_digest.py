import random

import numpy as np
import pytest
import torch

from ksuit_runner.data.digest import dataset_digest, first_shape
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
    return dataset_digest({"train": dataset}, "train")


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
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.float16),
    torch.zeros(1, 2, dtype=torch.float16),
    torch.zeros(()),
    torch.tensor(True),
    torch.zeros(2, dtype=torch.complex64),
    torch.arange(6).reshape(2, 3),
    torch.arange(6).reshape(2, 3).T,
]


def test_samples_of_any_kind_are_told_apart():
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

    assert first_shape({"train": One()}, "train") == shape


def test_samples_without_a_tensor_have_no_shape():
    assert first_shape({"train": Items(["text"])}, "train") is None
