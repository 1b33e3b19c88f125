"""Lock one GPU per process, where several processes share the GPUs of a machine."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ksuit_runner.system.lock_file import try_lock

DEVICE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_CLAIMED = "KSUIT_CLAIMED_DEVICE"


def claim_device(lock_files: Sequence[tuple[str, Path]], timeout_s: float = 60.0) -> str | None:
    """Lock a device and make it the only one that this process sees, for as long as it lives.

    The device is held by a lock on a file, which the system releases when the process ends, however it ends. It has to
    be claimed before CUDA is first used; a process that has one keeps it.

    Args:
        lock_files: Devices, as ``CUDA_VISIBLE_DEVICES`` names them, with the file that stands for each.
        timeout_s: How long to wait for a device of a process that is about to end, in seconds.

    Returns:
        The device; None if others held all of them until the timeout, then nothing is changed.
    """
    if os.environ.get(_CLAIMED):
        return os.environ[_CLAIMED]
    deadline = time.monotonic() + timeout_s
    while lock_files:
        for device, path in lock_files:
            if _try_lock(path):
                os.environ[DEVICE_VARIABLE] = os.environ[_CLAIMED] = device
                return device
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    return None


def _try_lock(path: Path) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    is_locked = try_lock(file)
    if not is_locked:
        os.close(file)
    return is_locked  # the file stays open: closing it would release the device
