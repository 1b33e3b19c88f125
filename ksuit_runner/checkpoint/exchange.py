"""Exchanging states between the ranks of a run: whatever a checkpoint can hold."""

from typing import Any

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
