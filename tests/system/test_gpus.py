import ctypes

from ksuit_runner.system.gpus import gpu_names, gpu_of_rank, visible_gpus


class Nvml:
    """The driver's library, of a machine with two GPUs."""

    NAMES = (b"NVIDIA H100 80GB HBM3", b"NVIDIA A100-SXM4-40GB MIG 1g.5gb")

    def __init__(self, path):
        assert path == "libnvidia-ml.so.1"
        self.started = 0

    def nvmlInit_v2(self):
        self.started += 1
        return 0

    def nvmlShutdown(self):
        self.started -= 1

    def nvmlDeviceGetCount_v2(self, count):
        assert self.started
        count._obj.value = len(self.NAMES)

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 1000 + index.value

    def nvmlDeviceGetName(self, device, name, size):
        assert len(name) == size.value
        name.value = self.NAMES[device.value - 1000]


def test_gpus_are_counted_and_named_without_cuda(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", Nvml)
    assert gpu_names() == [name.decode() for name in Nvml.NAMES]
    assert visible_gpus() == ["0", "1"]


def test_a_rank_sees_its_part_of_a_gpu():
    """CUDA shows the first part only, so each rank has to be told its own."""
    parts = {"CUDA_VISIBLE_DEVICES": "MIG-a, MIG-b"}
    assert [gpu_of_rank(rank, parts) for rank in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": "MIG-a"},
        {"CUDA_VISIBLE_DEVICES": "MIG-b"},
        {},
    ]
    assert gpu_of_rank(1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == {}
