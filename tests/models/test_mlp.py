from collections.abc import Callable

import pytest
import torch
from omegaconf import ListConfig
from torch.nn import functional as F

from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.mlp import ACTIVATIONS, Mlp


@pytest.mark.parametrize("hidden_dims", [(), (16,), [16, 8], ListConfig([16, 8, 4])])
def test_hidden_layers_and_output_shape(hidden_dims: object) -> None:
    model = Mlp((1, 8, 8), (2, 5), hidden_dims=hidden_dims)
    assert [layer.out_features for layer in model.hidden] == list(hidden_dims)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 2, 5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_the_one_of_torch(activation: str) -> None:
    torch.manual_seed(0)
    model = Mlp((4,), (3,), hidden_dims=(5,), activation=activation)
    x = torch.randn(2, 4)
    expected = model.head(getattr(F, activation)(model.hidden[0](x)))
    assert torch.equal(model(x), expected)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = Mlp((4,), (3,), dropout=0.5)
    x = torch.randn(2, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_gradient_steps_reduce_the_loss(train: Callable[..., list[float]]) -> None:
    torch.manual_seed(0)
    digits = Digits("train")
    losses = train(Mlp(digits.input_shape, digits.output_shape), [(digits.inputs, digits.targets)] * 20, lr=0.01)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_dims": [16, 0]}, "hidden_dims"),
        ({"activation": "rleu"}, "activation: there is no 'rleu'. Did you mean 'relu'"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mlp((4,), (3,), **arguments)
