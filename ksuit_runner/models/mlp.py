"""Multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from ksuit_runner.config.types import FractionBelowOne, PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError, did_you_mean

ACTIVATIONS = (
    "celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus",
    "softsign", "tanh",
)  # fmt: skip
"""Activations by their names in ``torch.nn.functional``."""


class Mlp(nn.Module):
    """Fully connected layers with an activation and dropout after each hidden one.

    Args:
        input_shape: Shape of one input, without the batch dimension.
        output_shape: Shape of one output, without the batch dimension.
        hidden_dims: Number of units of each hidden layer; none makes the model linear.
        activation: One of ``ACTIVATIONS``, a name in ``torch.nn.functional``.
        dropout: Probability that a hidden unit is dropped in training (Srivastava et al., "Dropout: A Simple Way to
            Prevent Neural Networks from Overfitting", JMLR 2014).

    Raises:
        ConfigError: If a number is out of its range or the activation is unknown.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        hidden_dims: Sequence[PositiveInt] = (128,),
        activation: str = "relu",
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__()
        check_numbers("PositiveInt", hidden_dims=hidden_dims)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation: there is no '{activation}'. {did_you_mean(activation, ACTIVATIONS)}")
        check_numbers("FractionBelowOne", dropout=dropout)
        self.output_shape = tuple(output_shape)
        self.activation: Callable[[Tensor], Tensor] = getattr(nn.functional, activation)
        self.dropout = nn.Dropout(dropout)
        dims = [prod(input_shape), *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(dims))
        self.head = nn.Linear(dims[-1], prod(output_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(batch, *input_shape)`` to logits ``(batch, *output_shape)``."""
        x = x.flatten(start_dim=1)
        for layer in self.hidden:
            x = self.activation(layer(x))
            if self.dropout.p:
                x = self.dropout(x)
        logits: Tensor = self.head(x)
        return logits if len(self.output_shape) == 1 else logits.reshape(x.shape[0], *self.output_shape)
