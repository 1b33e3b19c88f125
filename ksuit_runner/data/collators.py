"""Collate functions for ``data.collate_fn``: mixup and cutmix, and a choice between several."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import default_collate

from ksuit_runner.config.types import FractionUpToOne, NonNegativeFloat, PositiveFloat, TwoOrMore, check_numbers
from ksuit_runner.data.fetch_batch import getitems_of
from ksuit_runner.errors import ConfigError, did_you_mean

CollateFn = Callable[[Any], Any]


class _Mixing(ABC):
    """Mixes each sample of a batch with the one before it, which is a random one where the order is shuffled.

    Targets become probabilities of classes, float32 of shape (batch, classes), which ``CrossEntropyLoss`` accepts. What
    is drawn belongs to the batch, and is the same after a resume.

    Args:
        num_classes: Number of classes.
        alpha: Both parameters of the beta distribution that the share of a sample is drawn from; 1 is uniform.
        probability: How many batches are mixed; the others only get their targets as probabilities.
        collate_fn: Makes a batch of inputs and targets from a list of samples; by default torch's.

    Raises:
        ConfigError: An argument is out of range, or a batch cannot be mixed.
    """

    takes_batches: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: TwoOrMore,
        alpha: PositiveFloat = 1.0,
        probability: FractionUpToOne = 1.0,
        collate_fn: CollateFn | None = None,
    ) -> None:
        check_numbers("TwoOrMore", num_classes=num_classes)
        check_numbers("PositiveFloat", alpha=alpha)
        check_numbers("FractionUpToOne", probability=probability)
        self.num_classes = num_classes
        self.alpha = alpha
        self.probability = probability
        self.collate_fn = collate_fn or default_collate

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor]:
        """Return the mixed batch: inputs (batch, ...), targets (batch, classes)."""
        inputs, targets = self.collate_fn(samples) if isinstance(samples, list) else samples
        name = type(self).__name__
        if not inputs.is_floating_point():
            raise ConfigError(f"{name} needs inputs that are floating-point numbers, not {inputs.dtype}")
        if not targets.is_floating_point():
            if targets.ndim != 1 or targets.min() < 0 or targets.max() >= self.num_classes:
                raise ConfigError(f"{name} needs a class from 0 to {self.num_classes - 1} as the target of a sample")
            targets = one_hot(targets, self.num_classes).float()
        if np.random.random() >= self.probability:
            return inputs, targets
        inputs, share = self._mix(inputs, float(np.random.beta(self.alpha, self.alpha)))
        return inputs, targets * share + targets.roll(1, 0) * (1 - share)

    @abstractmethod
    def _mix(self, inputs: Tensor, share: float) -> tuple[Tensor, float]:
        """Return the mixed inputs, and the share of each sample in its own."""


class Mixup(_Mixing):
    """Mixup: inputs and targets are weighted means of two samples.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412.
    """

    def _mix(self, inputs: Tensor, share: float) -> tuple[Tensor, float]:
        return inputs * share + inputs.roll(1, 0) * (1 - share), share


class Cutmix(_Mixing):
    """CutMix: a rectangle of each image is that of another one, and targets are mixed by its area.

    Inputs are images of shape (batch, ..., height, width).

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
    ICCV 2019, arXiv:1905.04899.
    """

    def _mix(self, inputs: Tensor, share: float) -> tuple[Tensor, float]:
        if inputs.ndim < 3:
            raise ConfigError(f"Cutmix needs images of shape (batch, ..., height, width), not {tuple(inputs.shape)}")
        (top, bottom), (left, right) = (_span(size, share) for size in inputs.shape[-2:])
        mixed = inputs.clone()
        mixed[..., top:bottom, left:right] = inputs.roll(1, 0)[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (inputs.shape[-2] * inputs.shape[-1])


def _span(size: int, share: float) -> tuple[int, int]:
    """Return begin and end of a rectangle along one axis, around a random middle, cut off at the border."""
    middle, half = np.random.randint(size), size * float(np.sqrt(1 - share)) / 2
    return max(0, round(middle - half)), min(size, round(middle + half))


class OneOf:
    """Collates each batch by one of several collate functions, which is drawn.

    Args:
        collate_fns: The functions.
        weights: How often each is drawn in relation to others; all equally often if None.

    Raises:
        ConfigError: There is not one weight for each, or they are no weights.
    """

    def __init__(self, collate_fns: Sequence[CollateFn], weights: Sequence[NonNegativeFloat] | None = None) -> None:
        shares = np.ones(len(collate_fns)) if weights is None else np.asarray(weights, np.float64)
        if not collate_fns or shares.shape != (len(collate_fns),) or not (shares >= 0).all() or not shares.any():
            raise ConfigError("weights: one of 0 or more for each collate function is needed, and one of them above 0")
        self.collate_fns = list(collate_fns)
        self.takes_batches = all(getattr(function, "takes_batches", False) for function in collate_fns)
        self._ends = shares.cumsum() / shares.sum()

    def __call__(self, samples: Any) -> Any:
        """Return the batch."""
        chosen = int(np.searchsorted(self._ends, np.random.random(), side="right"))
        return self.collate_fns[chosen](samples)


class Collated:
    """A dataset with another collate function than its own.

    Args:
        dataset: The dataset.
        collate_fn: Gets a list of samples; or the finished batch where the dataset's ``__getitems__`` returns one and
            the function's attribute ``takes_batches`` is true.
    """

    def __init__(self, dataset: Any, collate_fn: CollateFn) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        """Return a list of samples, or the finished batch."""
        if (getitems := getitems_of(self.dataset)) is not None:
            found = getitems(indices)
            if isinstance(found, list):
                return found
            if getattr(self.collate_fn, "takes_batches", False):
                return self.collate_fn(found)
        return [self.dataset[int(index)] for index in indices]


def collate_fns(given: CollateFn | Mapping[str, CollateFn] | None, datasets: Collection[str]) -> dict[str, CollateFn]:
    """Return the collate functions that ``data.collate_fn`` gives to datasets, by key.

    Args:
        given: One function for all datasets, or functions by key, or none.
        datasets: Keys of the datasets.

    Raises:
        ConfigError: There is no such dataset, or something is not a function.
    """
    functions = given if isinstance(given, Mapping) else dict.fromkeys(datasets, given)
    for key, function in functions.items():
        path = f"data.collate_fn.{key}" if isinstance(given, Mapping) else "data.collate_fn"
        if key not in datasets:
            raise ConfigError(f"there is no dataset '{key}'. {did_you_mean(key, datasets)}", path=path)
        if function is not None and not callable(function):
            raise ConfigError(f"{function!r} is not a function", path=path)
    return {key: function for key, function in functions.items() if function is not None}
