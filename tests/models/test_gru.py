import pytest
import torch
from torch.nn import functional as F

from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.gru import Gru


def test_shapes_of_sequences_with_and_without_features() -> None:
    assert Gru((1, 1, 40), (10,))(torch.randn(3, 1, 1, 40)).shape == (3, 10)
    assert Gru((2, 3, 7), (4, 5), hidden_size=2)(torch.randn(6, 2, 3, 7)).shape == (6, 4, 5)
    assert Gru((9,), (1,), bidirectional=False)(torch.randn(2, 9)).shape == (2, 1)


def test_time_is_the_last_axis() -> None:
    """A network that reads forwards only cannot know at a step what comes later."""
    torch.manual_seed(0)
    model = Gru((2, 8), (3,), bidirectional=False)
    x = torch.randn(1, 2, 8)
    later = x.clone()
    later[:, :, 5:] += 1
    before, after = (model.gru(item.transpose(1, 2))[0] for item in (x, later))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [((), 6, "at least one axis"), ((4,), 0, "hidden_size: a whole number of at least 1 is needed")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gru(shape, (1,), hidden_size=size)


def test_learns_what_depends_on_order() -> None:
    """Whether a peak comes before a dip: the same numbers in both classes, and nothing for their sum to tell."""
    torch.manual_seed(0)
    inputs, targets = torch.zeros(200, 1, 10), torch.arange(200) % 2
    for row, target in enumerate(targets.tolist()):
        first, second = sorted(torch.randperm(10)[:2].tolist())
        inputs[row, 0, first], inputs[row, 0, second] = (1, -1) if target else (-1, 1)
    data = TensorDataset(inputs, targets, (2,))
    model = Gru(data.input_shape, data.output_shape, hidden_size=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(data.inputs), data.targets).backward()
        optimizer.step()
    assert (model(data.inputs).argmax(1) == data.targets).float().mean() > 0.95
