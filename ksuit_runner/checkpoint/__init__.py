"""Checkpoints: when they are written, their format on disk, committing and reading them.

The package imports nothing by itself: what commits checkpoints runs in a process without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksuit_runner.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointWriter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from ksuit_runner.checkpoint.writer import CheckpointWriter

    return CheckpointWriter
