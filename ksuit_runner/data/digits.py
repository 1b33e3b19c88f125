"""Handwritten digits that come with scikit-learn: real images for classification, without a download."""

import torch

from ksuit_runner.config.types import FractionBelowOne, NonNegativeInt, OpenFraction
from ksuit_runner.data.tensor_dataset import Split, TensorDataset, read_sklearn_table, split_rows


class Digits(TensorDataset):
    """1797 grey images of handwritten digits, 8x8 pixels.

    Inputs are float32 of shape ``(1, 8, 8)``, from 0 (white) to 1 (black); targets are the digits as int64 class
    indices; ``output_shape`` is ``(10,)``. The split holds the same share of every digit.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998, the test part, as scikit-learn ships it.

    Args:
        split: "train", "validation" or "test".
        test_fraction: Share of the images in the test split, between 0 and 1.
        split_seed: Seed of the shuffle that divides the images.
        validation_fraction: Share of the other images in the validation split, from 0 to below 1.

    Raises:
        ConfigError: If an argument is out of its range, or scikit-learn is missing.
    """

    def __init__(
        self,
        split: Split,
        test_fraction: OpenFraction = 0.2,
        split_seed: NonNegativeInt = 0,
        validation_fraction: FractionBelowOne = 0.0,
    ) -> None:
        table = read_sklearn_table("digits.csv.gz", delimiter=",")
        rows = split_rows(table[:, -1], split, test_fraction, split_seed, validation_fraction)
        inputs = torch.from_numpy(table[rows, :-1]).float().div_(16).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(table[rows, -1]).long()
        super().__init__(inputs, targets, output_shape=(10,))
