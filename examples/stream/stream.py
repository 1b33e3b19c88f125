"""An endless stream of measurements, which can be read from any position."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class Sensor(IterableDataset[tuple[Tensor, Tensor]]):
    """A sensor that measures an oscillation every second, for ever; the next measurement is to be predicted.

    A sample is a window of ``length`` measurements, float32 of shape (length,), and the one after it, of shape (1,).

    Args:
        length: Measurements in a window.
        noise: Standard deviation of the noise, which is drawn anew whenever a window is read.
        size: Number of windows; None for a stream without an end.
    """

    def __init__(self, length: int = 16, noise: float = 0.05, size: int | None = None) -> None:
        self.input_shape, self.output_shape = (length,), (1,)
        self.noise = noise
        self.size = size

    def iterate(self, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the windows from one on; nothing before it has to be read.

        A resume, and each of several workers, begins in the middle. What is drawn for a window belongs to its batch.
        """
        while self.size is None or position < self.size:
            seconds = torch.arange(position, position + self.input_shape[0] + 1, dtype=torch.float64)
            signal = (torch.sin(seconds / 3) + torch.sin(seconds / 7)).float()
            signal = signal + self.noise * torch.randn(len(signal))
            yield signal[:-1], signal[-1:]
            position += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate(0)
