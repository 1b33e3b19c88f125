import weakref

import pytest
import torch

from ksuit_runner.checkpoint.host_buffers import HostBuffers


def files():
    return {"a": {"w": torch.arange(3.0)}, "b": {"w": torch.ones(2, 2, dtype=torch.bfloat16)}, "c": {}}


def copy(buffers, *tensors):
    return list(buffers.copy({"x": dict(enumerate(tensors))})["x"].values())


def test_a_copy_equals_what_it_is_of(bits):
    assert bits(HostBuffers().copy(files())) == bits(files())


def test_training_does_not_change_a_copy(bits):
    live = files()
    copied = HostBuffers().copy(live)
    live["a"]["w"].add_(1)
    assert bits(copied) == bits(files())


def test_memory_is_reused():
    buffers = HostBuffers()
    first = buffers.copy(files())["a"]["w"]
    second = buffers.copy({**files(), "a": {"w": torch.full((3,), 7.0)}})["a"]["w"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [7, 7, 7]
    third = copy(buffers, torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16))[1]
    assert third.data_ptr() == buffers.copy(files())["b"]["w"].data_ptr()


def test_memory_that_is_not_needed_any_more_is_freed():
    buffers = HostBuffers()
    unused = weakref.ref(copy(buffers, torch.ones(3), torch.ones(2))[1])
    assert (unused() is not None, buffers.size) == (True, 20)
    copy(buffers, torch.ones(3))
    assert (unused(), buffers.size) == (None, 12)


def test_a_copy_is_complete_before_training_continues(monkeypatch):
    """What a GPU copies behind the program is waited for."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    copy(HostBuffers(), torch.ones(1))
    assert calls == ["synchronize"]


def test_a_tensor_of_another_shape_or_type_gets_new_memory(bits):
    buffers = HostBuffers()
    buffers.copy(files())
    for tensor in (torch.arange(5.0), torch.arange(5), torch.zeros(0)):
        assert bits(copy(buffers, tensor)) == bits([tensor])


def test_tied_and_sliced_tensors_get_their_own_memory():
    weight = torch.arange(12.0).reshape(3, 4)
    one, other, part = copy(HostBuffers(), weight, weight, weight[:, 1:3])
    assert one.data_ptr() != other.data_ptr()
    assert part.is_contiguous() and part.equal(weight[:, 1:3])


@pytest.mark.parametrize("name", ["channels last", "transposed", "permuted", "expanded"])
def test_a_copy_has_the_memory_layout_of_its_tensor(name):
    tensor = {
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.rand(3, 4).T,
        "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.rand(3, 1).expand(3, 4),
    }[name]
    buffers = HostBuffers()
    for _ in range(2):
        (copied,) = copy(buffers, tensor)
        assert copied.equal(tensor)
        assert copied.stride() == tensor.stride() or name == "expanded"


def test_gradients_are_not_copied():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not copy(HostBuffers(), parameter)[0].requires_grad
