import weakref

import pytest
import torch

from ksuit_runner.checkpoint.host_buffers import HostBuffers


def tree():
    return {"a": torch.arange(3.0), "b": [1, "x", (torch.ones(2, 2, dtype=torch.bfloat16), None)], "c": {}}


def test_a_copy_equals_the_tree_with_its_types(bits):
    copied = HostBuffers().copy(tree())
    assert bits(copied) == bits(tree())
    assert isinstance(copied["b"][2], tuple)


def test_training_does_not_change_a_copy(bits):
    live = tree()
    copied = HostBuffers().copy(live)
    live["a"].add_(1)
    assert bits(copied) == bits(tree())


def test_memory_is_reused():
    buffers = HostBuffers()
    first = buffers.copy(tree())["a"]
    second = buffers.copy({**tree(), "a": torch.full((3,), 7.0)})["a"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [7, 7, 7]
    third = buffers.copy([torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16)])[1]
    assert third.data_ptr() == buffers.copy(tree())["b"][2][0].data_ptr()


def test_memory_that_is_not_needed_any_more_is_freed():
    buffers = HostBuffers()
    unused = weakref.ref(buffers.copy([torch.ones(3), torch.ones(2)])[1])
    assert (unused() is not None, buffers.size) == (True, 20)
    buffers.copy([torch.ones(3)])
    assert (unused(), buffers.size) == (None, 12)


def test_the_types_of_the_last_copy_are_known():
    buffers, tensor = HostBuffers(), (torch.float32, torch.strided)
    for _ in range(2):
        buffers.copy({"a": torch.ones(3), "b": [1, ("x", None)]})
        assert buffers.kinds == [tensor, int, str, type(None)]


def test_a_copy_is_complete_before_training_continues(monkeypatch):
    """What a GPU copies behind the program is waited for."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    HostBuffers().copy([torch.ones(1)])
    assert calls == ["synchronize"]


def test_a_tensor_of_another_shape_or_type_gets_new_memory(bits):
    buffers = HostBuffers()
    buffers.copy(tree())
    for tensor in (torch.arange(5.0), torch.arange(5), torch.zeros(0)):
        assert bits(buffers.copy({"a": tensor})) == bits({"a": tensor})


def test_tied_and_sliced_tensors_get_their_own_memory():
    weight = torch.arange(12.0).reshape(3, 4)
    copied = HostBuffers().copy({"in": weight, "out": weight, "part": weight[:, 1:3]})
    assert copied["in"].data_ptr() != copied["out"].data_ptr()
    assert copied["part"].is_contiguous() and copied["part"].equal(weight[:, 1:3])


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
        copied = buffers.copy([tensor])[0]
        assert copied.equal(tensor)
        assert copied.stride() == tensor.stride() or name == "expanded"


def test_similar_names_are_distinguished(bits):
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    assert bits(HostBuffers().copy(tree)) == bits(tree)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:torch.quantize", "ignore:The PyTorch API of nested")
def test_sparse_quantized_and_nested_tensors_are_copied_as_they_are():
    buffers = HostBuffers()
    for scale in (0.1, 0.2):  # it belongs to the tensor, and memory cannot take another
        sparse, quantized = torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(2), scale, 0, torch.quint8)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])
        copied = buffers.copy((sparse, quantized, nested))
        sparse.values().zero_()
        nested.zero_()
        assert buffers.size == 0
        assert copied[0].to_dense().equal(torch.eye(3)) and copied[1].equal(quantized) and copied[2].is_nested
        assert copied[1].q_scale() == scale and all(part.all() for part in copied[2].unbind())


def test_gradients_are_not_copied():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not HostBuffers().copy([parameter])[0].requires_grad
