"""Accuracy of a logistic regression on the features of layers."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.feature import Labelled, ProbeCallback
from ksuit_runner.config.types import PositiveFloat, PositiveInt, check_numbers


class LogisticRegressionProbe(ProbeCallback):
    """Logs ``logistic_regression_accuracy/DATASET``: that of a classifier fitted to another dataset, for all weights.

    Features are scaled to mean 0 and deviation 1, and fitted by L-BFGS of scikit-learn on the CPU. Of several layers it
    is ``logistic_regression_accuracy_LAYER/DATASET``.

    Source: Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016, arXiv:1610.01644.

    Args:
        inverse_regularization: scikit-learn's C: the smaller, the stronger the L2 penalty.
        max_iterations: Most iterations of the fit; where they do not suffice, a warning says so.
        **kwargs: Passed on to ProbeCallback.

    Raises:
        ConfigError: A number is not positive.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "logistic_regression_accuracy/{dataset_key}{/weights}",
        "logistic_regression_accuracy_*/{dataset_key}{/weights}",
    )
    metric: ClassVar[str] = "logistic_regression_accuracy"

    def __init__(
        self, inverse_regularization: PositiveFloat = 1.0, max_iterations: PositiveInt = 1000, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveFloat", inverse_regularization=inverse_regularization)
        check_numbers("PositiveInt", max_iterations=max_iterations)
        self.inverse_regularization, self.max_iterations = inverse_regularization, max_iterations

    def _accuracy(self, fitted: Labelled, scored: Labelled) -> float:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features, classes = (item.double().cpu().numpy() if item.ndim > 1 else item.cpu().numpy() for item in fitted)
        regression = LogisticRegression(C=self.inverse_regularization, max_iter=self.max_iterations)
        classifier = make_pipeline(StandardScaler(), regression)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's own words
            classifier.fit(features, classes)
        if regression.n_iter_.max() >= self.max_iterations:
            path = f"callbacks.{self.display_name}.max_iterations"
            self.logger.warning("%s: the fit has not converged in %d iterations", path, self.max_iterations)
        return float(classifier.score(scored[0].double().cpu().numpy(), scored[1].cpu().numpy()))
