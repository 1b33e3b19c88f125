"""Exchanging and comparing states between the ranks of a run: whatever a checkpoint can hold."""

from hashlib import blake2b
from typing import Any

import msgspec
import torch

from ksuit_runner.checkpoint.state_types import Packer, unpack
from ksuit_runner.distributed.world import World


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
    keys = list(packer.tensors)
    gathered = world.gather([document, keys])
    if not any(keys for _, keys in gathered):
        return [unpack(document, {}) for document, _ in gathered]
    tensors = world.gather_tensors([packer.tensors[key].detach() for key in keys])
    return [
        unpack(document, dict(zip(keys, held, strict=True)))
        for (document, keys), held in zip(gathered, tensors, strict=True)
    ]


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
