"""Accuracy of nearest neighbours on the features of layers."""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch
from torch.nn.functional import normalize, one_hot

from ksuit_runner.callback_bases.feature import Labelled, ProbeCallback
from ksuit_runner.config.types import PositiveFloat, PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError

_MOST_VALUES: Final = 1 << 24  # similarities, or votes, in memory at once


class KnnProbe(ProbeCallback):
    """Logs ``knn_accuracy/DATASET``: that of a vote of the nearest neighbours in another dataset, for all weights.

    The nearest are those whose features have the highest cosine similarity s; each votes with exp(s / temperature). Of
    several layers it is ``knn_accuracy_LAYER/DATASET``.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018,
    arXiv:1805.01978.

    Args:
        k: Number of neighbours.
        temperature: Temperature of the votes; a large one counts them equally.
        **kwargs: Passed on to ProbeCallback.

    Raises:
        ConfigError: A number is not positive, or there are not so many samples.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "knn_accuracy/{dataset_key}{/weights}",
        "knn_accuracy_*/{dataset_key}{/weights}",
    )
    metric: ClassVar[str] = "knn_accuracy"

    def __init__(self, k: PositiveInt = 20, temperature: PositiveFloat = 0.07, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", k=k)
        check_numbers("PositiveFloat", temperature=temperature)
        if (most := self.fit_samples) is not None and k > most:
            raise ConfigError(f"k: {k} is more than the {most} samples to fit to")
        self.k, self.temperature = k, temperature

    def _accuracy(self, fitted: Labelled, scored: Labelled) -> float:
        (bank, classes), (features, targets) = fitted, scored
        bank, votes = normalize(bank), one_hot(classes).float()
        predicted = []
        for some in torch.split(normalize(features), max(1, _MOST_VALUES // max(len(bank), self.k * votes.shape[1]))):
            similarity, nearest = (some @ bank.T).topk(self.k)
            weights = ((similarity - 1) / self.temperature).exp()
            predicted.append(torch.einsum("nk,nkc->nc", weights, votes[nearest]).argmax(1))
        return float((torch.cat(predicted) == targets).double().mean())
