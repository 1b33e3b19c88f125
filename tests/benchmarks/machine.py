"""The machine of a measurement: processor, versions, and load by other processes."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

PACKAGES = ("torch", "mlflow", "numpy", "hydra-core", "lightning", "transformers", "accelerate", "pytorch-ignite")


def describe() -> dict[str, Any]:
    """Return processor, cores, system, and the versions of what is compared; None for what is not installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


class Load:
    """How busy the machine was with other processes while something was measured here."""

    def __init__(self) -> None:
        self._start = self._now()

    def by_others(self) -> float:
        """Return the share of all cores' time that other processes have taken since the start, from 0 to 1."""
        wall, busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, min(1.0, (busy - own) / (wall * (os.cpu_count() or 1))))

    def _now(self) -> Sequence[float]:
        cpu, own = psutil.cpu_times(), os.times()
        idle = cpu.idle + getattr(cpu, "iowait", 0.0)
        busy = sum(cpu[:8]) - idle  # what follows are guests, which are counted in user time too
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


def is_installed(package: str) -> bool:
    return _version(package) is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
