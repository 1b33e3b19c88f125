"""The GPUs of the machine, found without importing torch."""

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_NONE = ("", "-1", "NoDevFiles")  # such a name ends the list, as it does for CUDA


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that a process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    named = environment.get(_VISIBLE)
    if named is None:
        return [str(index) for index in range(_count())]
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
    names = []
    with suppress(OSError, AttributeError):  # there is no driver, or an old one
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() == 0:
            for index in range(_count()):
                device, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
                nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
                nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(_NAME_BYTES))
                names.append(name.value.decode(errors="replace"))
            nvml.nvmlShutdown()
    return names


def _count() -> int:
    """Count as torch does, by the driver's own library, which leaves CUDA alone."""
    count = ctypes.c_int(0)
    with suppress(OSError, AttributeError):  # there is no driver, or an old one
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            nvml.nvmlShutdown()
    return count.value
