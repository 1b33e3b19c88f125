"""Which kernels torch chooses during a run: deterministic ones, and those with the precision of TF32."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ksuit_runner.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACE = ":4096:8"


@contextmanager
def chosen_kernels(deterministic: bool, tf32: bool | None = None) -> Iterator[None]:
    """Choose kernels while the block runs.

    Args:
        deterministic: Use deterministic ones only; an operation without one raises an error.
        tf32: Whether matrix products and convolutions of float32 are computed in TF32 where the device has it; None
            leaves that as it is.

    Raises:
        ConfigError: This process has set the precision of float32 in a way that cannot be restored.
    """
    # Cublas reads it when CUDA starts, and torch once per process: a later run may be a deterministic one.
    os.environ.setdefault(_WORKSPACE, _DETERMINISTIC_WORKSPACE)
    with _deterministic(deterministic), _tf32(tf32):
        yield


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    _choose_deterministic(enabled)
    torch.backends.cudnn.benchmark = False
    # Filling empty tensors with NaN finds bugs in kernels, it does not make them deterministic, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _choose_deterministic(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def _choose_deterministic(enabled: bool) -> None:
    """Do what ``torch.use_deterministic_algorithms`` does without importing torch's compiler, over a second."""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(enabled))  # read when the compiler is imported
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(enabled)
    else:
        torch.set_deterministic_debug_mode("error" if enabled else "default")


@contextmanager
def _tf32(enabled: bool | None) -> Iterator[None]:
    if enabled is None:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch has two ways to set it, and does not read one after the other was used
        message = "this process sets torch's fp32_precision itself; null leaves it so"
        raise ConfigError(message, path="trainer.tf32") from None
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def check_deterministic(device: torch.device) -> None:
    """Check that a GPU's matrix products can be deterministic: what decides is how CUDA was started in this process.

    Raises:
        ConfigError: They cannot.
    """
    if device.type != "cuda":
        return
    try:
        torch.mm(torch.ones(1, 1, device=device), torch.ones(1, 1, device=device))
    except RuntimeError as error:
        if _WORKSPACE not in str(error):
            raise
        raise ConfigError(
            f"this process has used CUDA before the run, without {_WORKSPACE}={_DETERMINISTIC_WORKSPACE} in its "
            "environment, so that matrix products cannot be deterministic any more. Set os.environ before the first "
            "use of CUDA (in a notebook: restart, and set it first), or do without the exact resume, with "
            "trainer.deterministic=false",
            path="trainer.deterministic",
        ) from error
