import pytest
import torch

from ksuit_runner.tensors import foreach

KERNELS = ["_foreach_copy_", "_foreach_lerp_", "_foreach_mul_", "_foreach_norm"]


def results():
    torch.manual_seed(0)
    ours, theirs = [torch.randn(3, 2), torch.randn(7)], [torch.randn(3, 2), torch.randn(7)]
    copies = [torch.zeros(3, 2), torch.zeros(7)]
    foreach.copy_all(copies, theirs)
    foreach.lerp_all(ours, theirs, 0.3)
    foreach.multiply_all(theirs, torch.tensor(0.7))
    return [*copies, *ours, *theirs, *foreach.norms(ours)]


@pytest.mark.parametrize("name", KERNELS)
def test_without_a_private_kernel_of_torch_the_result_is_the_same(bits, monkeypatch, name):
    expected, called, kernel = bits(results()), [], getattr(torch, name)

    def counted(*args):
        called.append(name)
        return kernel(*args)

    monkeypatch.setattr(torch, name, counted)
    assert bits(results()) == expected and called
    monkeypatch.delattr(torch, name)
    assert bits(results()) == expected
