"""Recurrent network for sequences."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError


class Gru(nn.Module):
    """A gated recurrent network over the last axis of the input, and a linear head over its outputs at all steps.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, arXiv:1406.1078. Size and
    head are those with which Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", 2024, compare models.

    Args:
        input_shape: Shape of one input, without the batch dimension; the last axis is time, all others are features.
        output_shape: Shape of one output, without the batch dimension.
        hidden_size: Number of units per direction.
        bidirectional: Whether a second network reads the sequence backwards.

    Raises:
        ConfigError: If there is no time axis or a number is out of its range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        hidden_size: PositiveInt = 6,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        if not input_shape:
            raise ConfigError("input_shape: Gru needs at least one axis, the last one is time.")
        check_numbers("PositiveInt", hidden_size=hidden_size)
        self.output_shape = tuple(output_shape)
        self.gru = nn.GRU(prod(input_shape[:-1]), hidden_size, batch_first=True, bidirectional=bidirectional)
        directions = 2 if bidirectional else 1
        self.head = nn.Linear(input_shape[-1] * directions * hidden_size, prod(output_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences ``(batch, *features, time)`` to logits ``(batch, *output_shape)``."""
        steps = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
        outputs, _ = self.gru(steps)
        logits: Tensor = self.head(outputs.flatten(start_dim=1))
        return logits.reshape(x.shape[0], *self.output_shape)
