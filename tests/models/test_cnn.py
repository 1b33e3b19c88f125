from collections.abc import Callable

import pytest
import torch
from omegaconf import ListConfig
from torch import nn

from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.cnn import Cnn


@pytest.mark.parametrize("channels", [(5,), [8, 16], ListConfig([8, 12, 16])])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_output_has_the_asked_shape(channels: object, kernel_size: int) -> None:
    model = Cnn((3, 9, 6), (2, 5), channels=channels, kernel_size=kernel_size)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == list(channels)
    assert model(torch.randn(4, 3, 9, 6)).shape == (4, 2, 5)


def test_stages_after_the_first_halve_the_image() -> None:
    model = Cnn((1, 8, 8), (10,), channels=(8, 8, 8))
    x = torch.randn(1, 1, 8, 8)
    sizes = []
    for stage in model.stages:
        x = stage(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(8, 8), (4, 4), (2, 2)]


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    torch.manual_seed(0)
    model = Cnn((1, 8, 8), (10,))
    x = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = Cnn((1, 8, 8), (10,), dropout=0.5)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_gradient_steps_reduce_the_loss(train: Callable[..., list[float]]) -> None:
    torch.manual_seed(0)
    digits = Digits("train")
    model = Cnn(digits.input_shape, digits.output_shape, channels=(8, 16, 16))
    losses = train(model, [digits.__getitems__(range(128))] * 20, lr=0.02)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (10,)}, "input_shape"),
        ({"channels": []}, "channels"),
        ({"channels": [8, -1]}, "channels"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cnn(**{"input_shape": (1, 8, 8), "output_shape": (10,), **arguments})
