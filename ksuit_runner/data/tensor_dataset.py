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

from ksuit_runner.config.types import check_numbers
from ksuit_runner.data.row_blocks import gathers_rows
from ksuit_runner.errors import ConfigError, did_you_mean

Split = Literal["train", "validation", "test"]


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

    @gathers_rows
    def __getitems__(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[Tensor, Tensor]:
        """Return the finished batch: inputs ``(batch, *input_shape)`` and targets ``(batch, *target_shape)``."""
        rows = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows)


def check_split(split: str, test_fraction: float, validation_fraction: float) -> None:
    """Raise ConfigError unless the split is known and the fractions are in their ranges."""
    if split not in get_args(Split):
        raise ConfigError(f"split: there is no split '{split}'. {did_you_mean(split, get_args(Split))}")
    check_numbers("OpenFraction", test_fraction=test_fraction)
    check_numbers("FractionBelowOne", validation_fraction=validation_fraction)
    if split == "validation" and validation_fraction == 0:
        raise ConfigError("validation_fraction: it must be above 0 for a validation split.")


def split_rows(
    labels: NDArray[Any], split: Split, test_fraction: float, split_seed: int, validation_fraction: float = 0.0
) -> NDArray[np.int64]:
    """Return the sorted rows of a split that holds the same share of every label.

    The rows of each label are shuffled with a generator seeded by ``split_seed``; the first
    ``round(test_fraction * n)`` of its ``n`` rows are for testing, the next ``round(validation_fraction * m)`` of the
    other ``m`` rows for validation, and the rest for training.

    Args:
        labels: Shape ``(samples,)``; the same value everywhere splits without regard to labels.
        split: Which of the three parts.
        test_fraction: Share of the samples in the test split, between 0 and 1.
        split_seed: Seed of the shuffle, 0 or more.
        validation_fraction: Share of the samples that are not in the test split in the validation split.

    Raises:
        ConfigError: If an argument is out of its range or leaves the split empty.
    """
    check_split(split, test_fraction, validation_fraction)
    check_numbers("NonNegativeInt", split_seed=split_seed)
    generator = np.random.Generator(np.random.PCG64(split_seed))
    parts = []
    for label in np.unique(labels):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        parts.append(_part_of(shuffled, split, test_fraction, validation_fraction))
    rows = np.sort(np.concatenate(parts))
    if len(rows) == 0:
        name, fraction = ("test_fraction", test_fraction)
        if split == "validation":
            name, fraction = ("validation_fraction", validation_fraction)
        raise ConfigError(f"{name}: {fraction} of {len(labels)} samples leaves the {split} split empty.")
    return rows


def _part_of(
    shuffled: NDArray[np.int64], split: Split, test_fraction: float, validation_fraction: float
) -> NDArray[np.int64]:
    test_count = round(test_fraction * len(shuffled))
    end = test_count + round(validation_fraction * (len(shuffled) - test_count))
    return {"test": shuffled[:test_count], "validation": shuffled[test_count:end], "train": shuffled[end:]}[split]


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
