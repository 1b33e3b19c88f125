import torch
from torch.nn import functional as F

from ksuit_runner.data.diabetes import Diabetes
from ksuit_runner.models.linear import Linear


def test_output_has_the_asked_shape() -> None:
    model = Linear(input_shape=(1, 8, 8), output_shape=(2, 5))
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 2, 5)
    assert model(torch.randn(0, 1, 8, 8)).shape == (0, 2, 5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 65 * 10


def test_is_affine() -> None:
    torch.manual_seed(0)
    model = Linear((4,), (3,))
    x, y = torch.randn(2, 5, 4)
    torch.testing.assert_close(model(x) + model(y), model(x + y) + model(torch.zeros(5, 4)))


def test_gradient_steps_beat_the_mean_predictor() -> None:
    torch.manual_seed(0)
    train, test = Diabetes("train"), Diabetes("test")
    model = Linear(train.input_shape, train.output_shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        F.mse_loss(model(train.inputs), train.targets).backward()
        optimizer.step()
    assert F.mse_loss(model(test.inputs), test.targets) < 0.75
