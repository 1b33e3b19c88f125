import pytest
import torch
from torch import nn

from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.trainer.gradients import clip_gradients, clip_values, graphs_built, versions


def parameters(*kinds):
    """Return parameters with gradients, of these types of numbers."""
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(3, 2, dtype=kind)) for kind in kinds]
    for parameter in made:
        parameter.grad = torch.randn(3, 2).to(parameter.dtype)
    return [*made, nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize("limit", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kinds", [[torch.float32] * 3, [torch.float32, torch.bfloat16], []])
def test_clipping_is_torchs_to_the_bit(bits, kinds, limit):
    ours, theirs = parameters(*kinds), parameters(*kinds)
    norm = clip_gradients(ours, limit, Strategy())
    assert bits(norm) == bits(nn.utils.clip_grad_norm_(theirs, limit))
    assert [bits(item.grad) for item in ours] == [bits(item.grad) for item in theirs]


def test_sparse_gradients_are_clipped_as_the_same_ones_in_full():
    norms, gradients = [], []
    for sparse in (True, False):
        table, head = parameters(torch.float32, torch.float32)[:2]
        table.grad = None
        rows = nn.functional.embedding(torch.tensor([1, 1, 2]), table, sparse=sparse)
        (rows * torch.arange(3.0).unsqueeze(1)).sum().backward()
        norms.append(clip_gradients([table, head], 0.5, Strategy()))
        gradients.append([table.grad.to_dense() if sparse else table.grad, head.grad])
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kinds", [[torch.float32] * 3, [torch.float32, torch.bfloat16]])
def test_values_are_clipped_as_torch_does(bits, kinds):
    ours, theirs = parameters(*kinds), parameters(*kinds)
    clip_values(ours, 0.5, Strategy())
    nn.utils.clip_grad_value_(theirs, 0.5)
    assert [bits(item.grad) for item in ours[:-1]] == [bits(item.grad) for item in theirs[:-1]]
    assert ours[-1].grad is None


def test_versions_change_when_a_gradient_is_added_to():
    first, second = parameters(torch.float32, torch.float32)[:2]
    second.grad = None
    before = versions([first, second])
    assert versions([first, second]) == before
    first.sum().backward()
    between = versions([first, second])
    second.sum().backward()
    assert before != between != versions([first, second])


def test_the_number_changes_with_a_graph_only():
    """It is private to torch: where it is gone, the number changes with every call."""
    parameter = nn.Parameter(torch.ones(2))
    before = graphs_built()
    parameter.detach().square_()
    assert graphs_built() == before
    parameter.square()
    assert graphs_built() != before
