import sys
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from callbacks import system_metrics
from callbacks.system_metrics import SystemMetrics
from ksuit_runner.errors import ConfigError

SYSTEM = {"system": partial(SystemMetrics, every_n_updates=2)}


class Nvml(SimpleNamespace):
    """Two GPUs, of which the second one tells nothing but its memory."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=2_000_000, total=8_000_000)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self.told(gpu, 75))

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self.told(gpu, 350_000)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def told(self, gpu, value):
        if gpu == 1:
            raise self.NVMLError
        return value


def test_names_and_values_are_those_of_mlflow(new_run, monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(system_metrics, "find_spec", lambda name: nvml)
    monkeypatch.setattr("mlflow.system_metrics.metrics.gpu_monitor.pynvml", nvml, raising=False)
    run = new_run(SYSTEM, max_updates=4).train()
    ours = {key.removeprefix("system/"): run.metric(key) for key in run.metrics()}
    theirs = {}
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor(), GPUMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    assert ours.keys() == theirs.keys()
    assert all(list(values) == [2, 4] for values in ours.values())
    same = [key for key in theirs if key.startswith("gpu_")]
    assert len(same) == 7 and {key: ours[key][4] for key in same} == {key: theirs[key] for key in same}
    assert ours["system_memory_usage_megabytes"][4] == pytest.approx(theirs["system_memory_usage_megabytes"], rel=0.2)
    assert ours["disk_available_megabytes"][4] == pytest.approx(
        psutil.disk_usage(str(run.paths.run_dir)).free / 1e6, rel=0.05
    )
    assert 0 <= ours["network_receive_megabytes"][2] <= ours["network_receive_megabytes"][4]
    assert all(0 <= value <= 100 for key in ours if key.endswith("_percentage") for value in ours[key].values())


def test_without_a_driver_there_are_no_gpus(new_run, monkeypatch):
    class NoDriver(Nvml):
        def nvmlInit(self):
            raise self.NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    monkeypatch.setattr(system_metrics, "find_spec", lambda name: True)
    assert not [key for key in new_run(SYSTEM, max_updates=2).train().metrics() if "gpu" in key]


def test_a_run_on_a_gpu_needs_the_package(new_run, monkeypatch):
    monkeypatch.setattr("ksuit_runner.system.optional_package.find_spec", lambda name: None)
    trainer = new_run({}).run.trainer
    trainer.device = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"callbacks.system: 'pynvml' is .* 'ksuit_runner\[gpu\]'"):
        new_run(SYSTEM, "gpu", trainer=trainer)
