import pytest
import torch

from ksuit_runner.snapshot import HostBuffers


def tree():
    return {"a": torch.arange(3.0), "b": [1, "x", (torch.ones(2, 2, dtype=torch.bfloat16), None)], "c": {}}


def test_a_copy_equals_the_tree_and_keeps_its_kinds(bits):
    copied = HostBuffers().copy(tree())
    assert bits(copied) == bits(tree())
    assert isinstance(copied["b"][2], tuple)


def test_a_copy_stays_while_training_goes_on(bits):
    live = tree()
    copied = HostBuffers().copy(live)
    live["a"].add_(1)
    assert bits(copied) == bits(tree())


def test_the_same_memory_is_used_again():
    buffers = HostBuffers()
    first = buffers.copy(tree())["a"]
    second = buffers.copy({**tree(), "a": torch.full((3,), 7.0)})["a"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [7, 7, 7]


def test_a_tensor_of_another_shape_or_type_gets_new_memory(bits):
    buffers = HostBuffers()
    buffers.copy(tree())
    for tensor in (torch.arange(5.0), torch.arange(5), torch.zeros(0)):
        assert bits(buffers.copy({"a": tensor})) == bits({"a": tensor})


def test_tied_and_sliced_tensors_get_memory_of_their_own():
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


def test_names_that_look_alike_are_told_apart(bits):
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    assert bits(HostBuffers().copy(tree)) == bits(tree)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:torch.quantize")
def test_sparse_and_quantized_tensors_are_copied_as_they_are():
    sparse, quantized = torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    copied = HostBuffers().copy((sparse, quantized))
    sparse.values().zero_()
    assert copied[0].to_dense().equal(torch.eye(3)) and copied[1].equal(quantized)


def test_gradients_are_left_behind():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not HostBuffers().copy([parameter])[0].requires_grad
