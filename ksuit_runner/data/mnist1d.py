"""MNIST-1D: sequences that look like digits drawn in one stroke, made by the package `mnist1d`, without a download."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch

from ksuit_runner.data.tensor_dataset import Split, TensorDataset, check_split
from ksuit_runner.errors import ConfigError


class Mnist1d(TensorDataset):
    """5000 sequences of 40 numbers in 10 classes: 4000 to train, 1000 to test.

    Inputs are float32 of shape ``(1, 1, 40)``, an image of one row, with mean 0 and deviation 1 over all samples;
    targets are int64 class indices; ``output_shape`` is ``(10,)``.

    Source: Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024, arXiv:2011.14439; made with the
    package's own settings.

    Args:
        split: "train" or "test".
        data_seed: Seed of the generator; 42 makes the published dataset.

    Raises:
        ConfigError: If the split is unknown, or the package is missing.
    """

    def __init__(self, split: Split, data_seed: int = 42) -> None:
        check_split(split, 0.2)
        if find_spec("mnist1d") is None:
            raise ConfigError("'mnist1d' is not installed. pip install 'ksuit_runner[mnist1d]'")
        from mnist1d.data import get_dataset_args, make_dataset

        arguments = get_dataset_args()
        arguments.seed = data_seed
        with _left_alone():
            made = make_dataset(arguments)
        part = "" if split == "train" else "_test"
        inputs = torch.from_numpy(made[f"x{part}"]).float().reshape(-1, 1, 1, 40)
        super().__init__(inputs, torch.from_numpy(made[f"y{part}"]).long(), output_shape=(10,))


@contextmanager
def _left_alone() -> Iterator[None]:
    """Put the generators of Python and numpy back, which the package seeds."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
