"""Lock GPUs for a process, where several processes share the GPUs of a machine."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ksuit_runner.system.lock_file import try_lock

DEVICE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_CLAIMED = "KSUIT_CLAIMED_DEVICES"


def claim_devices(lock_files: Sequence[tuple[str, Path]], count: int = 1, timeout_s: float = 60.0) -> str | None:
    """Lock devices and make them the only ones that this process sees, for as long as it lives.

    A device is held by a lock on a file, which the system releases when the process ends, however it ends. They have to
    be claimed before CUDA is first used; a process that has as many keeps them.

    Args:
        lock_files: Devices, as ``CUDA_VISIBLE_DEVICES`` names them, with the file that stands for each.
        count: How many are claimed: one for each rank of a job, all of them if there are fewer.
        timeout_s: How long to wait for devices of processes that are about to end, in seconds.

    Returns:
        The devices, separated by commas; None if others held too many until the timeout, then nothing is changed.
    """
    held = os.environ.get(_CLAIMED, "")
    count = min(count, len(lock_files))
    if held and len(held.split(",")) >= count:
        return held
    deadline = time.monotonic() + timeout_s
    while lock_files:
        if (names := _try_locks(lock_files, count)) is not None:
            os.environ[DEVICE_VARIABLE] = os.environ[_CLAIMED] = names
            return names
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    return None


def _try_locks(lock_files: Sequence[tuple[str, Path]], count: int) -> str | None:
    """Lock so many devices, or none: two processes that each wait for the other's would do so for ever."""
    names, files = [], []
    for device, path in lock_files:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        files.append(file)
        if try_lock(file):
            names.append(device)
        else:
            os.close(files.pop())
        if len(names) == count:
            return ",".join(names)  # the files stay open: closing them would release the devices
    for file in files:
        os.close(file)
    return None
