"""Orders: which sample of the training dataset stands where in an epoch, named by ``data.order``.

An order maps positions to samples, so that a run can start anywhere in an epoch without what comes before. One of your
own, such as a curriculum, is a subclass of ``Order`` with the method ``part``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ksuit_runner.config.types import NonNegativeFloat, PositiveFloat, PositiveInt, check_numbers
from ksuit_runner.data.batch_plan import EpochOrder
from ksuit_runner.data.keyed_numbers import uniform
from ksuit_runner.data.wrappers import per_sample
from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean, named_type
from ksuit_runner.keyed_random import keyed, may_draw, mix, uses_no_rng


class Order(ABC):
    """Which samples of a dataset an epoch of training visits, and in which order.

    Args:
        dataset: The training dataset.
        seed: Seed of the run.
        samples_per_epoch: Number of positions in an epoch; by default ``size``.

    Attributes:
        is_endless: Whether an epoch may have more positions than ``size``.
    """

    is_endless: ClassVar[bool] = False

    def __init__(self, dataset: Any, seed: int, samples_per_epoch: PositiveInt | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.samples_per_epoch = samples_per_epoch

    @property
    def size(self) -> int:
        """Number of positions until every sample was visited: by default one for each sample of the dataset."""
        return len(self.dataset)

    def __len__(self) -> int:
        """Return the number of positions in an epoch."""
        return self.samples_per_epoch or self.size

    @abstractmethod
    def part(self, epoch: int, start: int, stop: int) -> ArrayLike:
        """Return the samples from one position to before another.

        It is called for one batch after the other, but after a resume for any batch first: the result may depend on
        the arguments only, and not on earlier calls. The generators of torch, numpy and ``random`` are seeded for the
        batch before, unless it is marked with ``keyed_random.uses_no_rng``, which saves time.

        Args:
            epoch: Epoch of training, from 1.
            start: First position in the epoch, from 0.
            stop: Position after the last one.

        Returns:
            ``stop - start`` indices into the dataset.
        """

    def uniform(self, epoch: int, start: int, stop: int) -> NDArray[np.float64]:
        """Return a random number in [0, 1) for each position, which depends on seed, epoch and position only."""
        return uniform(self.seed, type(self).__qualname__, epoch, start=start, stop=stop)


class Shuffled(Order):
    """Every sample once in an epoch, in an order that is drawn anew for each epoch: the default.

    Args:
        **kwargs: Passed on to Order.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._order = EpochOrder(self.seed, 0, 0)

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another."""
        if self._order.epoch != epoch:
            self._order = EpochOrder(self.seed, epoch, len(self.dataset))
        return self._order.part(start, stop)


class Sequential(Order):
    """Every sample once in an epoch, in the order of the dataset."""

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another."""
        return np.arange(start, stop)


class Repeated(Order):
    """Shuffled, and every sample several times in a row: a batch holds several augmentations of the same samples.

    Source: Hoffer et al., "Augment Your Batch", CVPR 2020, arXiv:1901.09335.

    Args:
        times: How often each sample comes in an epoch, which is as many times longer.
        **kwargs: Passed on to Order.

    Raises:
        ConfigError: It is less than 1.
    """

    def __init__(self, times: PositiveInt, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", times=times)
        self.times = times
        self._shuffled = Shuffled(**kwargs)

    @property
    def size(self) -> int:
        """Number of positions until every sample was visited."""
        return len(self.dataset) * self.times

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another."""
        first = start // self.times
        samples = self._shuffled.part(epoch, first, -(-stop // self.times))
        places: NDArray[np.int64] = np.arange(start, stop) // self.times - first
        return samples[places]


class _Drawn(Order):
    """Every position draws a sample with replacement, with probabilities that a subclass sets by ``_weigh``."""

    is_endless = True

    def _weigh(self, weights: NDArray[np.float64]) -> None:
        if weights.shape != (len(self.dataset),):
            raise ConfigError(
                f"weights: one for each of the {len(self.dataset)} samples is needed, not {weights.shape}"
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ConfigError("weights: all must be finite and 0 or more, and one of them more")
        self._ends = weights.cumsum()
        self._last = int(np.flatnonzero(weights)[-1])

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another."""
        drawn = self.uniform(epoch, start, stop) * self._ends[-1]
        found: NDArray[np.int64] = np.searchsorted(self._ends, drawn, side="right")
        return found.clip(max=self._last)  # for a product that is rounded up to the end


class Weighted(_Drawn):
    """Every position draws a sample with replacement, some more often than others.

    Args:
        weights: How often each sample is drawn in relation to others, one number of 0 or more for each; or the name of
            the dataset's attribute that has them.
        **kwargs: Passed on to Order.

    Raises:
        ConfigError: There are not as many weights as samples, or one of them is negative or not finite, or all are 0.
    """

    def __init__(self, weights: Sequence[NonNegativeFloat] | str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        given = per_sample(self.dataset, weights) if isinstance(weights, str) else weights
        self._weigh(np.asarray(given, np.float64))


class ClassBalanced(_Drawn):
    """Every position draws a class, all being equally likely, and then a sample of it, with replacement.

    Args:
        labels: Name of the dataset's attribute that has the class of each sample.
        **kwargs: Passed on to Order.

    Raises:
        ConfigError: The dataset has no such attribute, or not one class for each sample.
    """

    def __init__(self, labels: str = "targets", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        found = np.asarray(per_sample(self.dataset, labels))
        if found.ndim != 1:
            raise ConfigError(f"labels: one class for each sample is needed, not an array of shape {found.shape}")
        _, classes, counts = np.unique(found, return_inverse=True, return_counts=True)
        self._weigh(1 / counts[classes])


class Mixture(Order):
    """Several datasets, mixed in given shares; each of them is shuffled, visited to its end, and shuffled anew.

    The shares hold at any point of training, to within a sample for each block of positions.

    Args:
        weights: Share of each dataset of a ``Concatenated`` by its name; they need not sum up to 1.
        **kwargs: Passed on to Order.

    Raises:
        ConfigError: The training dataset is not a ``Concatenated``, or a weight is missing, not above 0 or too small.
    """

    is_endless = True
    _smallest: ClassVar[float] = 1e-5

    def __init__(self, weights: Mapping[str, PositiveFloat], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes: Mapping[str, int] | None = getattr(self.dataset, "sizes", None)
        if not isinstance(sizes, Mapping):
            raise ConfigError(
                "the training dataset has to be a ksuit_runner.data.wrappers.Concatenated of several, "
                f"not {named_type(self.dataset)}"
            )
        for name in weights:
            if name not in sizes:
                raise ConfigError(f"weights: there is no dataset '{name}'. {did_you_mean(name, sizes)}")
        if missing := sizes.keys() - weights.keys():
            raise ConfigError(f"weights: '{min(missing)}' has none")
        shares = np.array([weights[name] for name in sizes], np.float64)
        shares /= shares.sum()
        if not (shares >= self._smallest).all():
            raise ConfigError(f"weights: each must be above 0, and at least {self._smallest} of their sum")
        self._sizes = list(sizes.values())
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._bounds = shares.cumsum()[:-1]
        # In a block, the count of a dataset is rounded by less than 2 positions: so long that none becomes negative.
        self._block_size = max(1024, int(np.ceil(1 / shares.min())))
        self._block, self._samples = -1, np.empty(0, np.int64)

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another."""
        before = (epoch - 1) * len(self)
        start, stop = before + start, before + stop
        blocks = range(start // self._block_size, -(-stop // self._block_size))
        samples = np.concatenate([self._of_block(block) for block in blocks])
        first = blocks[0] * self._block_size
        return samples[start - first : stop - first]

    def _of_block(self, block: int) -> NDArray[np.int64]:
        """Return the samples of a block of positions, which are counted over all epochs."""
        if block != self._block:
            before, after = (self._counts(number * self._block_size) for number in (block, block + 1))
            places = EpochOrder(self.seed, block + 1, self._block_size).part(0, self._block_size)
            datasets = np.repeat(np.arange(len(self._sizes)), after - before)[places]
            self._block, self._samples = block, np.empty(self._block_size, np.int64)
            for number, (first, last) in enumerate(zip(before, after, strict=True)):
                self._samples[datasets == number] = self._starts[number] + self._walk(number, first, last)
        return self._samples

    def _counts(self, position: int) -> NDArray[np.int64]:
        """Return how many samples of each dataset stand before a position where a block begins."""
        ends = np.floor(position * self._bounds).astype(np.int64)
        return np.diff([0, *ends, position])

    def _walk(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return a part of the endless walk through a dataset."""
        size, parts = self._sizes[number], [np.empty(0, np.int64)]
        while first < last:
            walk, start = divmod(first, size)
            stop = min(size, start + last - first)
            parts.append(EpochOrder(mix(self.seed, "mixture", number), walk + 1, size).part(start, stop))
            first += stop - start
        return np.concatenate(parts)


class CheckedOrder:
    """The order of a run, whose parts are checked where the class is not one of those above.

    Args:
        order: The order.
    """

    def __init__(self, order: Order) -> None:
        if not order.is_endless and len(order) > order.size:
            raise ConfigError(
                f"{len(order)} is more than the {order.size} positions of {named_type(order)}, which visits every "
                "sample once",
                path="data.samples_per_epoch",
            )
        self._order = order
        self._length = len(order)
        self._is_shipped = type(order).part.__module__ == __name__
        self._may_draw = may_draw(type(order).part)

    def __len__(self) -> int:
        """Return the number of positions in an epoch."""
        return self._length

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another, int64; positions beyond the end are omitted.

        Raises:
            KsuitError: The order returns something else.
        """
        stop = min(stop, self._length)
        if self._is_shipped:
            return self._order.part(epoch, start, stop)  # type: ignore[return-value]
        with keyed(self._order.seed, "order", epoch, start) if self._may_draw else nullcontext():
            try:
                part = np.asarray(self._order.part(epoch, start, stop))
            except Exception as error:
                error.add_note(f"raised by data.order, for the samples {start} to {stop} of epoch {epoch}")
                raise
        samples = len(self._order.dataset)
        is_whole = part.shape == (stop - start,) and part.dtype.kind in "iu"
        if not is_whole or (len(part) and not 0 <= part.min() <= part.max() < samples):
            raise KsuitError(
                f"{type(self._order).__name__}.part({epoch}, {start}, {stop}) has to return {stop - start} whole "
                f"numbers from 0 to {samples - 1}, not an array of shape {part.shape} and type {part.dtype}"
                + (f" with {part.min()} to {part.max()}" if is_whole else ""),
                path="data.order",
            )
        return part.astype(np.int64, copy=False)
