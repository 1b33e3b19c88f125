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


def test_tied_and_sliced_tensors_become_whole_ones_of_their_own():
    weight = torch.arange(12.0).reshape(3, 4)
    copied = HostBuffers().copy({"in": weight, "out": weight, "turned": weight.T})
    assert copied["in"].data_ptr() != copied["out"].data_ptr()
    assert copied["turned"].is_contiguous() and copied["turned"].equal(weight.T)


def test_gradients_are_left_behind():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not HostBuffers().copy([parameter])[0].requires_grad
