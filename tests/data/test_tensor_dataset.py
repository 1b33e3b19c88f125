import numpy as np
import pytest
import torch

from ksuit_runner.data.tensor_dataset import TensorDataset, check_split, read_sklearn_table, split_rows
from ksuit_runner.errors import ConfigError

LABELS = np.repeat([0, 1, 2], [50, 30, 7])


@pytest.fixture
def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(12, 2, 3), torch.arange(12), output_shape=[12])


def test_shapes_are_tuples_without_the_batch(dataset: TensorDataset) -> None:
    assert len(dataset) == 12
    assert dataset.input_shape == (2, 3)
    assert dataset.output_shape == (12,)


@pytest.mark.parametrize(
    "indices", [[3, 0, 11], (5,), range(4), np.array([1, 7]), np.array([2, 2], dtype=np.int32), []]
)
def test_batch_equals_stacked_samples(dataset: TensorDataset, indices: object) -> None:
    inputs, targets = dataset.__getitems__(indices)
    assert inputs.shape == (len(indices), 2, 3)
    assert targets.dtype == torch.int64
    for row, index in enumerate(indices):
        assert torch.equal(inputs[row], dataset[index][0])
        assert torch.equal(targets[row], dataset[index][1])


def test_iterating_ends_after_the_last_sample(dataset: TensorDataset) -> None:
    assert [int(target) for _, target in dataset] == list(range(12))


def test_a_batch_is_a_copy(dataset: TensorDataset) -> None:
    inputs, _ = dataset.__getitems__([0, 1])
    before = dataset.inputs.clone()
    inputs.zero_()
    assert torch.equal(dataset.inputs, before)


def test_inputs_and_targets_must_be_equally_many() -> None:
    with pytest.raises(ConfigError, match="3 inputs, but 2 targets"):
        TensorDataset(torch.zeros(3, 1), torch.zeros(2), output_shape=(1,))


def test_splits_are_disjoint_complete_and_stratified() -> None:
    train, test = (split_rows(LABELS, split, 0.2, 0) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(len(LABELS)))
    assert np.bincount(LABELS[test]).tolist() == [10, 6, 1]


def test_split_depends_on_the_seed_alone() -> None:
    assert np.array_equal(split_rows(LABELS, "test", 0.2, 1), split_rows(LABELS, "test", 0.2, 1))
    assert not np.array_equal(split_rows(LABELS, "test", 0.2, 1), split_rows(LABELS, "test", 0.2, 2))


@pytest.mark.parametrize(
    ("split", "fraction", "message"),
    [("tran", 0.2, "Did you mean 'train'"), ("test", 0.0, "test_fraction"), ("test", 1.0, "test_fraction")],
)
def test_impossible_splits(split: str, fraction: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_split(split, fraction, 0.1)


def test_negative_seed_and_empty_split() -> None:
    with pytest.raises(ConfigError, match="split_seed"):
        split_rows(LABELS, "train", 0.2, -1)
    with pytest.raises(ConfigError, match="leaves the test split empty"):
        split_rows(LABELS, "test", 0.001, 0)


def test_unknown_table() -> None:
    with pytest.raises(ConfigError, match=r"no_such\.csv"):
        read_sklearn_table("no_such.csv")
