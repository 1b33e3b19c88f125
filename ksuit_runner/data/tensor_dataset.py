"""Datasets of tensors in memory, and what the shipped ones share: splits, and the tables of scikit-learn."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.keyed_random import uses_no_rng

Split = Literal["train", "test"]


class TensorDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples of an input and a target, both rows of a tensor.

    A batch is one gather (``__getitems__``) instead of a list of samples that has to be stacked.

    Args:
        inputs: Shape ``(samples, *input_shape)``.
        targets: Shape ``(samples, *target_shape)``; class indices have shape ``(samples,)``.
        output_shape: What a model returns for one sample, such as ``(classes,)``.

    Attributes:
        input_shape: Shape of one input, without the batch dimension.
        output_shape: Shape of one output of the model, without the batch dimension.

    Raises:
        ConfigError: The numbers of inputs and targets differ.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, output_shape: Sequence[int]) -> None:
        if len(inputs) != len(targets):
            raise ConfigError(f"{type(self).__name__}: {len(inputs)} inputs, but {len(targets)} targets.")
        self.inputs = inputs
        self.targets = targets
        self.input_shape: tuple[int, ...] = tuple(inputs.shape[1:])
        self.output_shape: tuple[int, ...] = tuple(output_shape)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one sample: input ``(*input_shape)`` and its target."""
        return self.inputs[index], self.targets[index]

    @uses_no_rng
    def __getitems__(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[Tensor, Tensor]:
        """Return the finished batch: inputs ``(batch, *input_shape)`` and targets ``(batch, *target_shape)``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows)


def check_split(split: str, test_fraction: float) -> None:
    """Raise ConfigError unless the split is 'train' or 'test' and the fraction is between 0 and 1."""
    if split not in get_args(Split):
        raise ConfigError(f"split: there is no split '{split}'. {did_you_mean(split, get_args(Split))}")
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction: must be between 0 and 1, got {test_fraction}.")


def split_rows(labels: NDArray[Any], split: Split, test_fraction: float, split_seed: int) -> NDArray[np.int64]:
    """Return the sorted rows of a split that holds the same share of every label.

    The rows of each label are shuffled with a generator seeded by ``split_seed``; the first
    ``round(test_fraction * n)`` of its ``n`` rows are for testing, the others for training.

    Args:
        labels: Shape ``(samples,)``; the same value everywhere splits without regard to labels.
        split: Which of the two parts.
        test_fraction: Share of the samples in the test split, between 0 and 1.
        split_seed: Seed of the shuffle, 0 or more.

    Raises:
        ConfigError: If an argument is out of its range or leaves the split empty.
    """
    check_split(split, test_fraction)
    if split_seed < 0:
        raise ConfigError(f"split_seed: must be 0 or more, got {split_seed}.")
    generator = np.random.Generator(np.random.PCG64(split_seed))
    parts = []
    for label in np.unique(labels):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        test_count = round(test_fraction * len(shuffled))
        parts.append(shuffled[:test_count] if split == "test" else shuffled[test_count:])
    rows = np.sort(np.concatenate(parts))
    if len(rows) == 0:
        raise ConfigError(f"test_fraction: {test_fraction} of {len(labels)} samples leaves the {split} split empty.")
    return rows


@lru_cache(maxsize=2)  # the splits of a dataset, and the runs of a sweep, come from the same tables
def read_sklearn_table(name: str, delimiter: str | None = None) -> NDArray[np.float64]:
    """Read a table of numbers that scikit-learn ships, without the second that importing scikit-learn takes.

    The table is shared, and so cannot be written to.

    Args:
        name: File in scikit-learn's ``datasets/data``, plain or gzipped.
        delimiter: What separates columns; white space if None.

    Raises:
        ConfigError: If scikit-learn is not installed or has no such file.
    """
    spec = find_spec("sklearn")
    for package in (spec and spec.submodule_search_locations) or ():
        path = Path(package) / "datasets" / "data" / name
        if path.is_file():
            table = np.loadtxt(path, delimiter=delimiter)
            table.setflags(write=False)
            return table
    raise ConfigError(f"The data file '{name}' comes with scikit-learn, which is not installed or does not have it.")
