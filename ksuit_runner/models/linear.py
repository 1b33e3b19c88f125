"""Linear and logistic regression."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn


class Linear(nn.Module):
    """One affine map from all numbers of a sample to all of its outputs.

    Args:
        input_shape: Shape of one input, without the batch dimension.
        output_shape: Shape of one output, without the batch dimension.
    """

    def __init__(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> None:
        super().__init__()
        self.output_shape = tuple(output_shape)
        self.layer = nn.Linear(prod(input_shape), prod(output_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(batch, *input_shape)`` to logits ``(batch, *output_shape)``."""
        logits: Tensor = self.layer(x.flatten(start_dim=1))
        return logits.reshape(x.shape[0], *self.output_shape)
