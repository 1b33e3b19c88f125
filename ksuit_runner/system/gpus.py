"""The GPUs of the machine, found without importing torch."""

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_NONE = ("", "-1", "NoDevFiles")  # such a name ends the list, as it does for CUDA


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that a process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    named = environment.get(_VISIBLE)
    if named is None:
        return [str(index) for index in range(_ask_driver(_count, 0))]
    names = [name.strip() for name in named.split(",")]
    end = next((index for index, name in enumerate(names) if name in _NONE), len(names))
    return names[:end]


def gpu_of_rank(local_rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a rank needs in its environment to see its part of a GPU (MIG): CUDA sees only the first one named.

    Args:
        local_rank: Number of the rank on this machine.
        environment: The environment of all ranks.
    """
    gpus = visible_gpus(environment)
    is_part = local_rank < len(gpus) and gpus[local_rank].startswith("MIG-")
    return {_VISIBLE: gpus[local_rank]} if is_part else {}


def gpu_names() -> list[str]:
    """Return the names of the GPUs of this machine, without starting CUDA."""
    return _ask_driver(lambda nvml: [_name(nvml, index) for index in range(_count(nvml))], [])


def _ask_driver(question: Callable[[Any], Answer], otherwise: Answer) -> Answer:
    """Ask the driver's own library, as torch does, which leaves CUDA alone."""
    with suppress(OSError, AttributeError):  # there is no driver, or an old one
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() == 0:
            try:
                return question(nvml)
            finally:
                nvml.nvmlShutdown()
    return otherwise


def _count(nvml: Any) -> int:
    count = ctypes.c_int(0)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return count.value


def _name(nvml: Any, index: int) -> str:
    device, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
    nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(_NAME_BYTES))
    return name.value.decode(errors="replace")
