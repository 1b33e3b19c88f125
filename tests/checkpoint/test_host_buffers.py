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
    third = copy(buffers, torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(3))[0]
    assert third.data_ptr() == first.data_ptr(), "also if the state has other parts"


def test_a_state_that_grows_a_little_every_time_keeps_its_memory():
    buffers = HostBuffers()
    places = [copy(buffers, torch.ones(10_000), torch.ones(count))[0].data_ptr() for count in range(1, 100)]
    assert len(set(places)) <= 2


def test_memory_that_is_not_needed_any_more_is_freed():
    buffers = HostBuffers()
    held = copy(buffers, torch.ones(300), torch.ones(2))[0].untyped_storage()
    assert (held.nbytes(), buffers.size) == (1216 + 64, 1208)
    assert copy(buffers, torch.ones(170))[0].data_ptr() == held.data_ptr()
    held = copy(buffers, torch.ones(3))[0].untyped_storage()
    assert (held.nbytes(), buffers.size) == (64, 12)


class OnGpu(torch.Tensor):
    """A tensor in plain memory that claims to be on the GPU whose number it holds."""

    is_cuda = True

    @property
    def device(self):
        return torch.device("cuda", int(self.as_subclass(torch.Tensor)[0]))


def on_gpu(number):
    return torch.full((3,), float(number)).as_subclass(OnGpu)


@pytest.fixture
def calls(monkeypatch):
    """What the driver would be asked to do, since there is none."""
    calls = []

    class Driver:
        def cudaHostRegister(self, place, size, flags):
            calls.append(("pin", place, size))
            return int(size > 1000)

        def cudaHostUnregister(self, place):
            calls.append(("unpin", place))

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", device.index)))
    return calls


def test_training_waits_for_the_gpus_that_have_the_tensors(calls, monkeypatch):
    """Else a checkpoint would be torn, with valid checksums."""
    buffers, state, waits = HostBuffers(), [on_gpu(1), torch.ones(3), on_gpu(3)], []
    copies = copy(buffers, *state)
    assert sorted(number for call, number, *_ in calls if call == "wait") == [1, 3]
    state[2][2] = 7.0
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append((device.index, copies[2][2].item())))
    copy(buffers, *state)
    assert sorted(waits) == [(1, 7.0), (3, 7.0)], "once everything is copied"
    waits.clear()
    copy(buffers, torch.ones(3))
    assert not waits


def test_memory_for_a_gpu_is_pinned_as_one_block_and_unpinned_before_it_is_freed(calls):
    buffers = HostBuffers()
    *copies, plain = copy(buffers, *(on_gpu(0) for _ in range(3)), torch.ones(3))
    assert calls[0] == ("pin", copies[0].data_ptr(), 3 * 64)
    assert plain.untyped_storage().data_ptr() != copies[0].untyped_storage().data_ptr()
    calls.clear()
    larger = copy(buffers, *(on_gpu(0) for _ in range(5)))
    assert calls == [("unpin", copies[0].data_ptr()), ("pin", larger[0].data_ptr(), 5 * 64 + 20), ("wait", 0)]
    calls.clear()
    del buffers
    assert calls == [("unpin", larger[0].data_ptr())]
    assert larger[0].tolist() == [0.0] * 3


def test_memory_that_cannot_be_pinned_serves_as_well(calls, caplog, monkeypatch):
    def launch(size, device):
        calls.append(("launch", device))
        raise RuntimeError("CUDA error: the one of before")

    buffers = HostBuffers()
    monkeypatch.setattr(torch, "zeros", launch)
    assert copy(buffers, *(on_gpu(0) for _ in range(20)))[19].tolist() == [0.0] * 3
    assert "cannot pin 1280 bytes" in caplog.text
    assert [call for call, *_ in calls] == ["pin", "launch", "wait"], "CUDA keeps an error until it is asked"
    del buffers
    assert "unpin" not in {call for call, *_ in calls}


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
