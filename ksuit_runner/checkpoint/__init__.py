"""Checkpoints: when they are written, their format on disk, and reading them."""

from ksuit_runner.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointWriter"]
