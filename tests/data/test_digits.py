import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ksuit_runner.data.digits import Digits
from ksuit_runner.data.tensor_dataset import split_rows
from ksuit_runner.errors import ConfigError


@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_the_rows_of_scikit_learn(split: str) -> None:
    images, labels = load_digits(return_X_y=True)
    rows = split_rows(labels, split, 0.2, 0)
    digits = Digits(split)
    expected = (images[rows] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    assert np.array_equal(digits.inputs.numpy(), expected)
    assert np.array_equal(digits.targets.numpy(), labels[rows])


def test_shapes_types_and_range() -> None:
    digits = Digits("train")
    assert (digits.input_shape, digits.output_shape) == ((1, 8, 8), (10,))
    assert (digits.inputs.dtype, digits.targets.dtype) == (torch.float32, torch.int64)
    assert (digits.inputs.min(), digits.inputs.max()) == (0, 1)


def test_splits_are_complete_and_hold_every_digit_equally() -> None:
    train, test = Digits("train", test_fraction=0.3), Digits("test", test_fraction=0.3)
    assert len(train) + len(test) == 1797
    shares = test.targets.bincount() / (train.targets.bincount() + test.targets.bincount())
    assert (shares - 0.3).abs().max() < 0.01


def test_split_seed_makes_another_split() -> None:
    assert torch.equal(Digits("test").inputs, Digits("test").inputs)
    assert not torch.equal(Digits("test").inputs, Digits("test", split_seed=1).inputs)


def test_batch_equals_stacked_samples() -> None:
    digits = Digits("test")
    inputs, targets = digits.__getitems__([4, 0, 358])
    samples = [digits[index] for index in (4, 0, 358)]
    assert torch.equal(inputs, torch.stack([sample[0] for sample in samples]))
    assert torch.equal(targets, torch.stack([sample[1] for sample in samples]))


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match=r"no split 'tset'\. Did you mean 'test'"):
        Digits("tset")


def test_scikit_learn_is_not_imported() -> None:
    code = (
        "import sys; from ksuit_runner.data.digits import Digits; print(len(Digits('test')), 'sklearn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["359", "False"]
