"""Datasets around another dataset, for the config: a part of it, several in a row, its samples changed or kept."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ksuit_runner.config.types import FractionUpToOne, NonNegativeInt, PositiveFloat, TwoOrMore
from ksuit_runner.data.fetch_batch import get_samples
from ksuit_runner.data.permutation import KeyedPermutation
from ksuit_runner.errors import ConfigError, named_type
from ksuit_runner.keyed_random import keyed

_FORWARDED = ("input_shape", "output_shape", "collate_fn")


class Wrapper(Dataset[Any]):
    """A dataset around another one, whose ``input_shape``, ``output_shape`` and ``collate_fn`` it has.

    A subclass says which sample of the other one stands where, in ``_inner(indices)``.

    Args:
        dataset: The dataset inside, map-style.

    Raises:
        ConfigError: It is a stream, which has no length.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__"):
            raise ConfigError(f"{type(self).__name__} needs a dataset with __len__, not {named_type(dataset)}")
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name not in _FORWARDED or "dataset" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        return self.dataset[int(self._inner(np.array([index % len(self)]))[0])]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> Any:
        """Return a list of samples, or the finished batch if the dataset inside returns one."""
        return get_samples(self.dataset, self._inner(np.asarray(indices, np.int64)))

    def per_sample(self, name: str) -> Any:
        """Return an attribute of the dataset inside that has one entry for each sample, for the samples here."""
        return np.asarray(per_sample(self.dataset, name))[self._inner(np.arange(len(self)))]

    def _inner(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples of the dataset inside that stand at these indices."""
        return indices


def per_sample(dataset: Any, name: str) -> Any:
    """Return an attribute of a dataset that has one entry for each sample, such as ``targets``.

    A dataset of Hugging Face has columns (``column_names``) instead.

    Raises:
        ConfigError: The dataset has no such attribute, or another number of entries.
    """
    if isinstance(dataset, Wrapper):
        values = dataset.per_sample(name)
    else:
        values = dataset[name] if name in getattr(dataset, "column_names", ()) else getattr(dataset, name, None)
    if values is None:
        raise ConfigError(f"{named_type(dataset)} has no attribute '{name}', with an entry for each sample")
    if len(values) != len(dataset):
        raise ConfigError(
            f"'{name}' of {named_type(dataset)} has {len(values)} entries, and not one for each of its "
            f"{len(dataset)} samples"
        )
    return values


class Subset(Wrapper):
    """Some samples of a dataset: those at ``indices``, or those from ``start`` to before ``stop``.

    Args:
        dataset: The dataset.
        indices: Which samples, in the order in which they are to stand.
        start: First sample; a negative number counts from the end, and a fraction is one of the dataset.
        stop: Sample after the last one, likewise; the end if None.

    Raises:
        ConfigError: Both are given, or an index is out of range, or no sample is left.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int] | None = None,
        start: int | FractionUpToOne | None = None,
        stop: int | FractionUpToOne | None = None,
    ) -> None:
        super().__init__(dataset)
        if indices is not None and (start, stop) != (None, None):
            raise ConfigError("either indices, or start and stop can be given")
        if indices is None:
            first, last = (_position(name, value, len(dataset)) for name, value in (("start", start), ("stop", stop)))
            self._indices = np.arange(len(dataset))[first:last]
        else:
            self._indices = np.asarray(indices, np.int64)
            outside = self._indices[(self._indices < 0) | (self._indices >= len(dataset))]
            if len(outside):
                raise ConfigError(f"indices: there is no sample {outside[0]} among {len(dataset)}")
        if not len(self._indices):
            raise ConfigError(f"no sample of {len(dataset)} is left")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._indices)

    def _inner(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._indices[indices]


def _position(name: str, value: int | float | None, length: int) -> int | None:
    if not isinstance(value, float):
        return value
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: a fraction must be between 0 and 1, not {value}; a number of samples has no point")
    return round(value * length)


class Fold(Subset):
    """One fold of a dataset, or all others: for cross-validation, whose folds are the values of a sweep.

    Args:
        dataset: The dataset.
        part: ``fold``, to validate on; or ``rest``, all other samples, to train on.
        fold: Which fold it is, from 0.
        folds: Number of folds, whose sizes differ by 1 at most.
        seed: Which division into folds; that of the run has nothing to do with it.
        stratify: Attribute of the dataset with the class of each sample, such as ``targets``: every fold then has the
            same share of each class.

    Raises:
        ConfigError: There are fewer than two folds, more than samples, or none of this number.
    """

    def __init__(
        self,
        dataset: Any,
        part: Literal["rest", "fold"],
        fold: NonNegativeInt,
        folds: TwoOrMore = 5,
        seed: int = 0,
        stratify: str | None = None,
    ) -> None:
        if not 2 <= folds <= len(dataset):
            raise ConfigError(f"folds: 2 to {len(dataset)} are possible, as there are so many samples, not {folds}")
        if not 0 <= fold < folds:
            raise ConfigError(f"fold: a number from 0 to {folds - 1} is needed, not {fold}")
        order = KeyedPermutation("fold", seed, length=len(dataset))(np.arange(len(dataset)))
        if stratify is not None:
            order = order[np.argsort(np.asarray(per_sample(dataset, stratify))[order], kind="stable")]
        is_inside = np.arange(len(dataset)) % folds == fold  # dealt out one by one
        super().__init__(dataset, np.sort(order[is_inside == (part == "fold")]).tolist())


class ClassSubset(Subset):
    """The samples of some classes; their labels stay as they are.

    Args:
        dataset: The dataset.
        classes: The classes.
        labels: Name of the dataset's attribute that has the class of each sample.

    Raises:
        ConfigError: The dataset has no such attribute, or no sample of one of the classes.
    """

    def __init__(self, dataset: Any, classes: Sequence[int | str], labels: str = "targets") -> None:
        found = np.asarray(per_sample(dataset, labels))
        for item in classes:
            if not (found == item).any():
                raise ConfigError(f"classes: there is no sample of class {item!r}")
        super().__init__(dataset, indices=np.flatnonzero(np.isin(found, list(classes))).tolist())


class Repeat(Wrapper):
    """A dataset several times in a row, so that one epoch visits each sample as many times.

    Args:
        dataset: The dataset.
        times: How often; a fraction leaves out the end of the last time.

    Raises:
        ConfigError: It is not above 0, or no sample is left.
    """

    def __init__(self, dataset: Any, times: PositiveFloat) -> None:
        super().__init__(dataset)
        self._length = round(times * len(dataset)) if isfinite(times) else 0
        if self._length < 1:
            raise ConfigError(f"times: must be above 0 and leave a sample, not {times}")

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def _inner(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices % len(self.dataset)


class Transform(Wrapper):
    """A dataset whose samples are changed when they are fetched.

    What the transform draws from torch, numpy or ``random`` is the same after a resume.

    Args:
        dataset: The dataset; samples are fetched from it one by one.
        transform: Maps a part of a sample, or a whole one, to its replacement.
        part: Which part: an index into a sample that is a tuple or list (0 is mostly the input, 1 the target), a key of
            one that is a mapping; None for the whole sample.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], part: int | str | None = 0) -> None:
        super().__init__(dataset)
        self.transform = transform
        self.part = part

    def __getattr__(self, name: str) -> Any:
        if name == "input_shape":  # another one, perhaps; that of a sample counts
            raise AttributeError(name)
        return super().__getattr__(name)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        sample = self.dataset[index]
        if self.part is None:
            return self.transform(sample)
        if isinstance(sample, Mapping):
            return {**sample, self.part: self.transform(sample[self.part])}
        items: Any = list(sample)
        items[self.part] = self.transform(items[self.part])
        return type(sample)(*items) if hasattr(sample, "_fields") else type(sample)(items)

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """Return a list of samples."""
        return [self[int(index)] for index in indices]


class Cached(Wrapper):
    """A dataset whose samples are kept in memory once they have been fetched.

    A sample draws the same random numbers whenever it is fetched first, and so stays the same in every process: put
    augmentations around this dataset, not inside of it. Each worker keeps its own copies. A sample that is changed in
    place stays changed.

    Args:
        dataset: The dataset; samples are fetched from it one by one.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self._samples: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        if index not in self._samples:
            with keyed("cached", index):
                self._samples[index] = self.dataset[index]
        return self._samples[index]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """Return a list of samples."""
        return [self[int(index)] for index in indices]


class Concatenated(Wrapper):
    """Several datasets one after the other; the shapes and the collate function are those of the first.

    Args:
        datasets: The datasets, by names that ``data.order`` may refer to.

    Attributes:
        datasets: The datasets by name.
        sizes: Number of samples of each dataset by name.

    Raises:
        ConfigError: There is none.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        if not datasets:
            raise ConfigError("datasets: at least one is needed")
        super().__init__(next(iter(datasets.values())))
        self.datasets = dict(datasets)
        self.sizes = {name: len(dataset) for name, dataset in datasets.items()}
        self._ends = np.cumsum(list(self.sizes.values()))

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        dataset = list(self.datasets.values())[number]
        return dataset[index - int(self._ends[number]) + len(dataset)]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """Return a list of samples."""
        return [self[int(index)] for index in indices]

    def per_sample(self, name: str) -> Any:
        """Return an attribute of all datasets that has one entry for each sample."""
        return np.concatenate([np.asarray(per_sample(dataset, name)) for dataset in self.datasets.values()])
