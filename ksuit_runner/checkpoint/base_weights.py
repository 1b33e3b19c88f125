"""Weights that are not in a checkpoint, because training has not changed them: they are what the run began with."""

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.checkpoint.tensor_file import fits_file
from ksuit_runner.distributed.pieces import gathered, is_sharded, local
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import CheckpointError

BASE = "base"
"""Key of the checksums, by name, in the state of a checkpoint without these weights."""


class BaseWeights:
    """Knows the frozen weights that a run begins with, and which of them are still what they were.

    All ranks make one and ask it together, so that they leave out the same weights.

    Args:
        weights: The frozen weights by name, as the run begins.
        world: The ranks of the run; by default there is one.
    """

    def __init__(self, weights: Mapping[str, Tensor], world: World | None = None) -> None:
        self._world = world or World()
        held = {name: value for name, value in weights.items() if fits_file(local(value))}
        self._checksums = {name: checksum(value, self._world) for name, value in held.items()}
        self._own = {name: checksum(local(value)) for name, value in held.items() if is_sharded(value)}
        self._seen = {name: _mark(value) for name, value in held.items()}

    def unchanged(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the checksums, by name, of those frozen weights that have not changed since the run began.

        Args:
            weights: The weights that are frozen at present, by name.
        """
        changed = [name for name in self._seen if name not in weights or not self._is_seen(name, weights[name])]
        somewhere = set(chain.from_iterable(self._world.gather(changed)))
        return {name: found for name, found in self._checksums.items() if name not in somewhere}

    def _is_seen(self, name: str, value: Tensor) -> bool:
        """Whether a weight is as it was; only what torch has counted a change of is read again, which takes time."""
        if _mark(value) != self._seen[name] and checksum(local(value)) == self._own.get(name, self._checksums[name]):
            self._seen[name] = _mark(value)
        return _mark(value) == self._seen[name]


def _mark(value: Tensor) -> tuple[int, int]:
    return local(value).data_ptr(), local(value)._version


def checksum(value: Tensor, world: World | None = None) -> str:
    """Return the SHA-256 of a tensor's values, with its type and shape.

    Args:
        value: The tensor.
        world: The ranks over which it may be spread; all of them call this.
    """
    whole = gathered(value, world or World()).detach().cpu()
    found = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)}".encode())
    found.update(whole.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def with_base(
    stored: Mapping[str, Any], base: Mapping[str, str], begun: Mapping[str, Any], world: World | None = None
) -> dict[str, Any]:
    """Return all weights of a checkpoint.

    Args:
        stored: The weights in it.
        base: Checksums of the others by name.
        begun: The weights that the run began with.
        world: The ranks over which these may be spread; all of them call this.

    Raises:
        CheckpointError: These are others.
    """
    for name, expected in base.items():
        value = begun.get(name)
        if value is None or not fits_file(local(value)) or checksum(value, world) != expected:
            raise CheckpointError(
                f"the checkpoint has only what was trained, and '{name}' is not what its run began with: the model or "
                "what it is initialized from has changed since",
                path="model",
            )
    return {**{name: begun[name] for name in base}, **stored}


def without_base(
    files: Mapping[str, Mapping[str, Any]], base: Mapping[str, Tensor], world: World
) -> dict[str, Mapping[str, Any]]:
    """Return the weights of several files without those that are, on all ranks, the frozen ones of the same name."""
    same = {
        file: [name for name, value in weights.items() if _is_same(value, base.get(name))]
        for file, weights in files.items()
    }
    on_ranks = world.gather(same)
    left_out = {file: set.intersection(*(set(each[file]) for each in on_ranks)) for file in files}
    return {
        file: {name: value for name, value in weights.items() if name not in left_out[file]}
        for file, weights in files.items()
    }


def _is_same(value: Any, base: Tensor | None) -> bool:
    if base is None or not isinstance(value, Tensor) or value.dtype != base.dtype or value.shape != base.shape:
        return False
    one, other = local(value), local(base)
    return one.data_ptr() == other.data_ptr() or (one.shape == other.shape and torch.equal(one, other))
