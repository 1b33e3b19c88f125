"""Small convolutional network."""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd, prod

from torch import Tensor, nn

from ksuit_runner.config.types import FractionBelowOne, PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError


class Cnn(nn.Module):
    """Convolutions with group normalization and ReLU, the mean over all positions, and a linear head.

    Every stage after the first halves height and width by its stride (Springenberg et al., "Striving for Simplicity:
    The All Convolutional Net", 2014, arXiv:1412.6806), so images of any size work. Group normalization (Wu and He,
    2018, arXiv:1803.08494) keeps no running statistics: a sample's output does not depend on the other samples. The
    mean over positions is global average pooling (Lin et al., "Network In Network", 2013, arXiv:1312.4400).

    Args:
        input_shape: ``(channels, height, width)`` of one image.
        output_shape: Shape of one output, without the batch dimension.
        channels: Number of channels of each stage.
        kernel_size: Height and width of the kernels in pixels, odd.
        dropout: Probability that a feature is dropped before the head in training.

    Raises:
        ConfigError: If the inputs are not images or a number is out of its range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        channels: Sequence[PositiveInt] = (32, 64, 128),
        kernel_size: PositiveInt = 3,
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(f"input_shape: Cnn needs (channels, height, width), got {tuple(input_shape)}.")
        check_numbers("PositiveInt", channels=channels, kernel_size=kernel_size)
        if not channels:
            raise ConfigError("channels: one stage or more is needed")
        if kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size: an odd number is needed, not {kernel_size}")
        check_numbers("FractionBelowOne", dropout=dropout)
        self.output_shape = tuple(output_shape)
        counts = [input_shape[0], *channels]
        self.stages = nn.Sequential(
            *(
                _stage(before, after, kernel_size, stride=1 if index == 0 else 2)
                for index, (before, after) in enumerate(pairwise(counts))
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(counts[-1], prod(output_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, *output_shape)``."""
        features: Tensor = self.stages(x)
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits.reshape(x.shape[0], *self.output_shape)


def _stage(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """Convolution, normalization, activation; the normalization makes a bias of the convolution redundant."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(gcd(out_channels, 8), out_channels),
        nn.ReLU(),
    )
