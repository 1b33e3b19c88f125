"""Exchanging and comparing states between the ranks of a run: whatever a checkpoint can hold."""

from hashlib import blake2b
from typing import Any

import msgspec
import torch
from torch import Tensor

from ksuit_runner.checkpoint.state_types import Packer, unpack
from ksuit_runner.distributed.world import World

_SMALL = 4096  # bytes of tensors up to which they are sent with what describes them


def gather_state(world: World, location: str, state: Any) -> list[Any]:
    """Return the states of all ranks, in their order.

    Args:
        world: The ranks of the run.
        location: Where the state is from, for the message.
        state: What ``Packer.pack`` takes. Tensors of other ranks arrive on the CPU.

    Raises:
        CheckpointError: It contains something else.
        PeerError: A rank has failed, is lost, or does not answer in time.
    """
    if world.size == 1:
        return [state]
    packer = Packer()
    document = packer.pack(location, state, "")
    keys, own = list(packer.tensors), [tensor.detach() for tensor in packer.tensors.values()]
    is_small = sum(tensor.nbytes for tensor in own) <= _SMALL
    gathered = world.gather([document, keys, [_as_bytes(tensor) for tensor in own] if is_small else None])
    if all(sent is not None for _, _, sent in gathered):  # with a single exchange, as after every log
        tensors = [[_as_tensor(*each) for each in sent] for _, _, sent in gathered]
    else:
        tensors = world.gather_tensors(own)
    return [
        unpack(document, dict(zip(keys, held, strict=True)))
        for (document, keys, _), held in zip(gathered, tensors, strict=True)
    ]


def _as_bytes(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """Return dtype, shape and values of a tensor."""
    values = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), values


def _as_tensor(dtype: str, shape: list[int], values: bytes) -> Tensor:
    """Return the tensor that ``_as_bytes`` described, on the CPU."""
    held = torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)
    return held.view(getattr(torch, dtype)).reshape(shape)


def digest(location: str, state: Any) -> str:
    """Return a digest of a state: ranks that have the same state have the same.

    A tensor that is spread over the ranks is the same one on all of them, and only its place counts.

    Args:
        location: Where the state is from, for the message.
        state: What ``Packer.pack`` takes.

    Raises:
        CheckpointError: It contains something else.
    """
    packer = Packer()
    found = blake2b(msgspec.json.encode(packer.pack(location, state, "")), digest_size=16)
    for tensor in packer.tensors.values():
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
