"""Diabetes progression, a table that comes with scikit-learn: real data for regression, without a download."""

import numpy as np
import torch

from ksuit_runner.config.types import FractionBelowOne, NonNegativeInt, OpenFraction
from ksuit_runner.data.tensor_dataset import Split, TensorDataset, read_sklearn_table, split_rows


class Diabetes(TensorDataset):
    """Ten measurements of 442 patients and how far their diabetes had progressed one year later.

    Inputs are float32 of shape ``(10,)`` (age, sex, body mass index, blood pressure and six blood serum values),
    targets float32 of shape ``(1,)``; ``output_shape`` is ``(1,)``. Both are standardized with the mean and the
    standard deviation of the training split. Always predicting the mean (0) therefore has a mean squared error of
    1 on the training split and about 1 on the test split: a model that learns something is below.

    Source: B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, "Least Angle Regression", Annals of Statistics, 2004,
    as scikit-learn ships it.

    Args:
        split: "train", "validation" or "test".
        test_fraction: Share of the patients in the test split, between 0 and 1.
        split_seed: Seed of the shuffle that divides the patients.
        validation_fraction: Share of the other patients in the validation split, from 0 to below 1.

    Attributes:
        target_mean: Mean progression in the training split, in the original unit.
        target_std: Its standard deviation; ``target * target_std + target_mean`` is in the original unit.

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
        inputs = read_sklearn_table("diabetes_data_raw.csv.gz")
        targets = read_sklearn_table("diabetes_target.csv.gz").reshape(-1, 1)
        one_label = np.zeros(len(targets))
        rows = split_rows(one_label, split, test_fraction, split_seed, validation_fraction)
        train = split_rows(one_label, "train", test_fraction, split_seed, validation_fraction)
        self.target_mean = float(targets[train].mean())
        self.target_std = float(targets[train].std())
        inputs = (inputs - inputs[train].mean(axis=0)) / inputs[train].std(axis=0)
        targets = (targets - self.target_mean) / self.target_std
        super().__init__(torch.from_numpy(inputs[rows]).float(), torch.from_numpy(targets[rows]).float(), (1,))
