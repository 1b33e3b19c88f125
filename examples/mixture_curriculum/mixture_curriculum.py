"""A curriculum over a mixture of two datasets: an order of the project's own."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.data.order import Order
from ksuit_runner.keyed_random import uses_no_rng


class EasyFirst(Order):
    """Begins with the first dataset of a ``Concatenated``, and draws more and more samples from the second one.

    It says which samples stand at some positions of an epoch, from nothing but these positions: that makes a resume
    exact, in the middle of an epoch and with any number of workers.

    Args:
        epochs: Number of epochs until the second dataset has its full share.
        share: This share, from 0 to 1.
        **kwargs: Passed on to Order.
    """

    is_endless = True  # samples come again, so that an epoch may have any number of them

    def __init__(self, epochs: int, share: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epochs = epochs
        self.share = share
        self.sizes = list(self.dataset.sizes.values())

    @uses_no_rng
    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at positions ``start`` to before ``stop``, as indices into the dataset."""
        easy, hard = self.sizes
        share = self.share * min(1.0, (epoch - 1) / self.epochs)
        drawn = self.uniform(epoch, start, stop)  # a number in [0, 1) for each position
        is_hard = drawn < share
        within = np.where(is_hard, drawn / max(share, 1e-9), (drawn - share) / (1 - share))
        return np.where(is_hard, easy + within * hard, within * easy).astype(np.int64)
