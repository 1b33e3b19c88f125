import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from ksuit_runner.data.diabetes import Diabetes
from ksuit_runner.data.tensor_dataset import split_rows
from ksuit_runner.errors import ConfigError


def test_shapes_and_types() -> None:
    dataset = Diabetes("test")
    assert (dataset.input_shape, dataset.output_shape) == ((10,), (1,))
    assert dataset.targets.shape == (len(dataset), 1)
    assert (dataset.inputs.dtype, dataset.targets.dtype) == (torch.float32, torch.float32)


def test_training_split_is_standardized() -> None:
    train = Diabetes("train")
    for tensor in (train.inputs, train.targets):
        assert tensor.mean(dim=0).abs().max() < 1e-5
        assert (tensor.std(dim=0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("split", ["train", "test"])
def test_targets_go_back_to_those_of_scikit_learn(split: str) -> None:
    _, progression = load_diabetes(return_X_y=True, scaled=False)
    dataset = Diabetes(split)
    rows = split_rows(np.zeros(442), split, 0.2, 0)
    restored = dataset.targets[:, 0] * dataset.target_std + dataset.target_mean
    np.testing.assert_allclose(restored, progression[rows], rtol=1e-5)


def test_test_inputs_use_the_training_statistics() -> None:
    raw, _ = load_diabetes(return_X_y=True, scaled=False)
    train, test = (raw[split_rows(np.zeros(442), split, 0.2, 0)] for split in ("train", "test"))
    np.testing.assert_allclose(Diabetes("test").inputs, (test - train.mean(0)) / train.std(0), rtol=1e-4, atol=1e-5)


def test_mean_predictor_has_an_error_of_about_one() -> None:
    assert Diabetes("train").targets.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert Diabetes("test").targets.square().mean().item() == pytest.approx(1, abs=0.2)


def test_splits_share_the_scale_and_are_complete() -> None:
    train, test = Diabetes("train", split_seed=3), Diabetes("test", split_seed=3)
    assert len(train) + len(test) == 442
    assert (train.target_mean, train.target_std) == (test.target_mean, test.target_std)
    assert not torch.equal(test.inputs, Diabetes("test").inputs)


def test_batch_equals_stacked_samples() -> None:
    dataset = Diabetes("test")
    inputs, targets = dataset.__getitems__(np.array([7, 0]))
    assert torch.equal(inputs, torch.stack([dataset[7][0], dataset[0][0]]))
    assert torch.equal(targets, torch.stack([dataset[7][1], dataset[0][1]]))


def test_impossible_fraction() -> None:
    with pytest.raises(ConfigError, match="test_fraction"):
        Diabetes("train", test_fraction=1.5)
