"""The device of a run: choosing it, making it the current one, moving data to it, and its memory use."""

import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import undisturbed
from ksuit_runner.tensors.nested import is_movable, rebuilt


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of a name.

    Args:
        name: ``auto`` is the accelerator if there is one, and the CPU otherwise.
        local_rank: Number of this process among the ranks of its machine, if there are several ranks: each takes the
            GPU of its number, or the only one that it sees.

    Raises:
        ConfigError: The device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        name = _device_of_rank(name, local_rank)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"'{name}' is not available here ({reason}); 'auto' chooses an available one", path="trainer.device"
        ) from None


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of a device, to add up in: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def _device_of_rank(name: str, local_rank: int) -> str:
    if name != "cuda":
        raise ConfigError(f"'{name}' is one device, and every rank needs its own: write cuda", path="trainer.device")
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise ConfigError(
            f"rank {local_rank} of this machine needs a GPU of its own, and there are {count}", path="trainer.device"
        )
    return f"cuda:{local_rank}" if count > 1 else name


def gpu_identity(device: torch.device) -> list[str]:
    """Return what tells a GPU from all others that processes on any machine use; nothing for another device."""
    if device.type != "cuda":
        return []
    # Parts of one GPU (MIG) may have its id in common; a process sees one of them, under its name.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    return [socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), str(device.index), str(uuid)]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device: tensors and objects with a method ``to``, in any nesting.

    On the CPU the batch itself is returned, and so is everything in it that is not moved.
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if is_movable(batch):
        return batch.to(device)
    return rebuilt(batch, partial(to_device, device=device))


def device_name(device: torch.device) -> str:
    """Return the name of a device for people, such as ``cuda:0 (NVIDIA H100)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a device the current one while the block runs, and restore the state of its generator afterwards.

    What seeds, synchronizes or allocates without naming a device means the current one.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_device()
    torch.cuda.set_device(device)
    try:
        with undisturbed():
            yield
    finally:
        with suppress(RuntimeError):  # of a device that has failed: the block has its own error
            torch.cuda.set_device(before)


class MemoryPeak:
    """The peak memory use from now on: on an accelerator of its tensors, on the CPU of the whole process.

    On the CPU it begins now only where the system allows that, as Linux does, and else with the process. A second one
    on the same device lets the first one begin anew, too.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        # The peak that is read fast may be an earlier one: of the parent, with which Linux lets a process begin.
        self._begins_now = _largest_process() <= (_largest_image() or 0)

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = _largest_process()
        return peak if self._begins_now else _largest_image() or peak  # which takes a hundred times as long to read


def _largest_image() -> int | None:
    """Return the largest size that the process had in memory since its peak was reset, in bytes; None if not known."""
    with suppress(OSError):
        with open("/proc/self/status", "rb", buffering=0) as file:
            found = re.search(rb"^VmHWM:\s*(\d+) kB$", file.read(1 << 16), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return None


def _largest_process() -> int:
    """Return the largest size that the process, or what it was before ``exec``, ever had in memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
