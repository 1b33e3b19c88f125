"""The device of a run: choosing it, moving data to it, deterministic kernels and memory use."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.nested import is_movable, rebuilt


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the accelerator if there is one, and the CPU otherwise.

    Raises:
        ConfigError: The device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"'{name}' is not available here ({reason}); 'auto' chooses an available one", path="trainer.device"
        ) from None


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


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Make torch use deterministic kernels while the block runs; an operation without one raises an error."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _choose_kernels(enabled)
    torch.backends.cudnn.benchmark = False
    # Filling empty tensors with NaN finds bugs in kernels, it does not make them deterministic, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _choose_kernels(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def _choose_kernels(deterministic: bool) -> None:
    """Do what ``torch.use_deterministic_algorithms`` does without importing torch's compiler, over a second."""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(deterministic))  # read when the compiler is imported
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(deterministic)
    else:
        torch.set_deterministic_debug_mode("error" if deterministic else "default")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory use so far: on an accelerator of the tensors, on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
