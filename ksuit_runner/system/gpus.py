"""The GPUs of the machine, found without importing torch."""

import ctypes
import os
from contextlib import suppress

_NVML = "libnvidia-ml.so.1"
_NONE = ("", "-1", "NoDevFiles")  # such a name ends the list, as it does for CUDA


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(_count())]
    names = [name.strip() for name in named.split(",")]
    end = next((index for index, name in enumerate(names) if name in _NONE), len(names))
    return names[:end]


def _count() -> int:
    """Count as torch does, by the driver's own library, which leaves CUDA alone."""
    count = ctypes.c_int(0)
    with suppress(OSError, AttributeError):  # there is no driver, or an old one
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            nvml.nvmlShutdown()
    return count.value
