"""Weights that are not in a checkpoint, because training has not changed them: they are what the run began with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.checkpoint.tensor_file import fits_file
from ksuit_runner.errors import CheckpointError

BASE = "base"
"""Key of the checksums, by name, in the state of a checkpoint without these weights."""


class BaseWeights:
    """Knows the frozen weights that a run begins with, and which of them are still what they were.

    Args:
        weights: The frozen weights by name, as the run begins.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._checksums = {name: checksum(value) for name, value in weights.items() if fits_file(value)}
        self._seen = {name: _mark(weights[name]) for name in self._checksums}

    def unchanged(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the checksums, by name, of those frozen weights that have not changed since the run began.

        Args:
            weights: The weights that are frozen at present, by name.
        """
        for name in self._seen.keys() & weights.keys():
            # Only what torch has counted a change of is read again; to read everything takes as long as to store it.
            if _mark(weights[name]) != self._seen[name] and checksum(weights[name]) == self._checksums[name]:
                self._seen[name] = _mark(weights[name])
        same = [name for name, mark in self._seen.items() if name in weights and _mark(weights[name]) == mark]
        return {name: self._checksums[name] for name in same}


def _mark(value: Tensor) -> tuple[int, int]:
    return value.data_ptr(), value._version


def checksum(value: Tensor) -> str:
    """Return the SHA-256 of a tensor's values, with its type and shape."""
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def with_base(stored: Mapping[str, Any], base: Mapping[str, str], begun: Mapping[str, Any]) -> dict[str, Any]:
    """Return all weights of a checkpoint.

    Args:
        stored: The weights in it.
        base: Checksums of the others by name.
        begun: The weights that the run began with.

    Raises:
        CheckpointError: These are others.
    """
    for name, expected in base.items():
        value = begun.get(name)
        if value is None or not fits_file(value) or checksum(value) != expected:
            raise CheckpointError(
                f"the checkpoint has only what was trained, and '{name}' is not what its run began with: the model or "
                "what it is initialized from has changed since",
                path="model",
            )
    return {**{name: begun[name] for name in base}, **stored}


def without_base(weights: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return those of some weights that are not the frozen ones of the same name."""
    return {name: value for name, value in weights.items() if not _is_same(value, base.get(name))}


def _is_same(value: Any, base: Tensor | None) -> bool:
    if base is None or not isinstance(value, Tensor) or value.dtype != base.dtype or value.shape != base.shape:
        return False
    return value.data_ptr() == base.data_ptr() or torch.equal(value, base)
