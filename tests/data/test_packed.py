import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from ksuit_runner.data.packed import pack


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4, 2).permute(2, 0, 1),
        torch.arange(10)[::3],
        torch.zeros(1, 3).expand(4, 3),
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.bfloat16),
        torch.randn(3, dtype=torch.complex64),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_small_tensors_arrive_by_value_with_their_strides(tensor):
    made = pickle.loads(pack({"list": [tensor]}))["list"][0]
    assert torch.equal(made, tensor) and made.dtype == tensor.dtype and made.is_shared() is False
    assert made.stride() == tensor.clone().stride()


def test_a_part_of_a_large_tensor_is_copied_without_the_rest():
    table = torch.zeros(1000, 1000)
    assert len(pack([row[:10] for row in table[:200]])) < 200_000


def test_large_tensors_are_shared(monkeypatch):
    shared = []
    monkeypatch.setitem(
        ForkingPickler._extra_reducers, torch.Tensor, lambda tensor: (torch.zeros, (shared.append(tensor) or 1,))
    )
    pack([torch.zeros(1 << 18), torch.zeros(3)])
    assert [len(tensor) for tensor in shared] == [1 << 18]
