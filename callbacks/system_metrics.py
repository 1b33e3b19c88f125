"""What the machine does while a run trains."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, ClassVar

import psutil

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.system.optional_package import require_package


class SystemMetrics(PeriodicCallback):
    """Logs what the machine is doing, under the names of MLflow's system metrics.

    These are, all after ``system/``: ``cpu_utilization_percentage`` since the last log,
    ``system_memory_usage_megabytes`` and ``..._percentage``, ``disk_usage_megabytes``, ``disk_usage_percentage`` and
    ``disk_available_megabytes`` of the file system with the run's folder, ``network_receive_megabytes`` and
    ``network_transmit_megabytes`` since training began or was resumed; and of each NVIDIA GPU, through NVML,
    ``gpu_0_utilization_percentage``, ``gpu_0_memory_usage_megabytes`` and ``..._percentage``,
    ``gpu_0_power_usage_watts`` and ``..._percentage``, as far as it tells. A megabyte has 10^6 bytes. Of several
    machines it is the mean.

    Args:
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: The run is on a GPU, and nvidia-ml-py is not installed.
    """

    logs: ClassVar[Sequence[str] | None] = ("system/cpu_utilization_percentage", "system/*")
    is_repeatable: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.trainer.device.type == "cuda":
            require_package("pynvml", path=f"callbacks.{self.display_name}")
        self._gpus = _gpus()

    @uses_no_rng
    def _before_training(self, update_counter: UpdateCounter) -> None:
        psutil.cpu_percent()
        self._network = _network()

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        memory, (received, sent) = psutil.virtual_memory(), _network()
        disk = psutil.disk_usage(str(self.path_provider.run_dir))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (received - self._network[0]) / 1e6,
            "network_transmit_megabytes": (sent - self._network[1]) / 1e6,
        }
        for index, gpu in enumerate(self._gpus):
            values |= {f"gpu_{index}_{key}": value for key, value in _read(gpu)}
        for key, value in values.items():
            self.writer.add_scalar(f"system/{key}", value)


def _network() -> tuple[int, int]:
    """Return how many bytes the machine has received and sent; a container may have no network."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def _gpus() -> list[Any]:
    """Return NVML's handles of all GPUs of the machine; none without its package or its driver."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _read(gpu: Any) -> Iterator[tuple[str, float]]:
    """Yield what a GPU tells about itself; a part of one (MIG) has no utilization, others no power."""
    import pynvml

    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        yield "memory_usage_megabytes", memory.used / 1e6
        yield "memory_usage_percentage", memory.used / memory.total * 100
    with suppress(pynvml.NVMLError):
        yield "utilization_percentage", pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with suppress(pynvml.NVMLError):
        power = pynvml.nvmlDeviceGetPowerUsage(gpu)
        yield "power_usage_watts", power / 1e3
        yield "power_usage_percentage", power / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) * 100
