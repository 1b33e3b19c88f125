"""Pieces of tensors whose whole is spread over the ranks of a run."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.distributed.world import World
from ksuit_runner.tensors.nested import rebuilt


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor: a block of it.

    Attributes:
        tensor: Values of the block, which may be empty.
        offset: Position of its first element in the whole, one number for each dimension.
        shape: Shape of the whole.
        is_copy: Whether another rank holds the same block, and stores it.
    """

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_copy: bool = False


class StoredTensor(ABC):
    """A tensor in the files of several ranks, which is read when it is needed, and no more of it than that.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def read(self, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return a block of it, on the CPU and in memory of its own.

        Args:
            offset: Position of the block's first element, one number for each dimension.
            size: Shape of the block.
        """


def piece_of(value: Any) -> Piece | None:
    """Return what this rank holds of a tensor that is spread over the ranks; None for anything else.

    Args:
        value: A ``DTensor``, a ``Piece``, or anything else.
    """
    if isinstance(value, Piece):
        return value
    if not is_sharded(value):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    place = mesh.get_coordinate() or ()
    is_copy = any(at > 0 and kind.is_replicate() for at, kind in zip(place, placements, strict=True))
    return Piece(value.to_local().detach(), tuple(offset), tuple(value.shape), is_copy)


def is_sharded(value: Any) -> bool:
    """Whether a value is a ``DTensor``; the module of these is loaded by those who make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory: all of it unless it is spread over the ranks."""
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def gathered(tensor: Tensor, world: World) -> Tensor:
    """Return the whole of a tensor that is spread over the ranks, on the CPU; any other one as it is.

    All ranks call it, for the same tensors in the same order.

    Raises:
        PeerError: A rank has failed, is lost, or does not answer in time.
    """
    piece = piece_of(tensor)
    if piece is None:
        return tensor
    found = torch.empty(piece.shape, dtype=piece.tensor.dtype)
    offsets, blocks = world.gather(piece.offset), world.gather_tensors([piece.tensor])
    for offset, [block] in zip(offsets, blocks, strict=True):
        found[block_at(offset, block.shape)] = block
    return found


def place(value: Any, like: Any) -> Any:
    """Return a stored value as this rank is to hold it.

    Args:
        value: A tensor, a ``StoredTensor``, or anything else, which is returned as it is.
        like: What it replaces, or is the state of. If that is a ``DTensor`` of the same shape, the result is one with
            the same placements, of which only this rank's piece is read; else it is a whole tensor.
    """
    if not isinstance(value, Tensor | StoredTensor) or is_sharded(value):
        return value
    if not is_sharded(like) or value.shape != like.shape:
        return whole(value)
    piece = piece_of(like)
    assert piece is not None
    offset, size = piece.offset, tuple(piece.tensor.shape)
    block = value[block_at(offset, size)].clone() if isinstance(value, Tensor) else value.read(offset, size)
    return spread(block.to(like.device), like)


def place_all(tree: Any, like: Any = None) -> Any:
    """Return nested dicts, lists and tuples with every value in them as this rank is to hold it; see ``place``."""
    return (
        place(tree, like) if isinstance(tree, Tensor | StoredTensor) else rebuilt(tree, partial(place_all, like=like))
    )


def whole(value: Any) -> Any:
    """Return a ``StoredTensor`` as a tensor, wholly read; anything else is returned as it is."""
    return value.read((0,) * len(value.shape), value.shape) if isinstance(value, StoredTensor) else value


def block_at(offset: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Return what selects the block of a size at an offset."""
    return tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))


def spread(block: Tensor, like: Any) -> Tensor:
    """Return the tensor of which this rank holds a block; it is spread over the ranks, or whole, as another one is."""
    if not is_sharded(like):
        return block
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    found: Tensor = DTensor.from_local(block, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return found
