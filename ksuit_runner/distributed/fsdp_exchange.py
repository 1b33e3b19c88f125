"""How FSDP2 exchanges parameters and gradients on the CPU: with waits that notice when another rank has failed.

Torch's own would end when the time of the group is up, and not say which rank it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.ranks import Ranks, all_gather


class _Exchange:
    def __init__(self, world: Ranks) -> None:
        self._world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for an exchange."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Exchange):
    """Gathers tensors of the same size, see ``FSDPModule.set_custom_all_gather``."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Write the tensors of all ranks of a group into one.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        begin = partial(all_gather, output_tensor, input_tensor, group=group, async_op=True)
        self._world.finish(self._world.start(begin))


class ReduceScatter(_Exchange):
    """Adds up tensors, of which each rank gets a part, see ``FSDPModule.set_custom_reduce_scatter``.

    They are added up in the order of ``PartTree``, so that what is one part for each rank rounds as with strategy=ddp.
    gloo's own order depends on the number of ranks, and its reduce_scatter waits without the limit that it is given.

    Args:
        world: The ranks.
        has_replicas: Whether torch adds up what several groups have found next: without a limit, so that all ranks have
            to be there first.
    """

    def __init__(self, world: Ranks, has_replicas: bool = False) -> None:
        super().__init__(world)
        self._has_replicas = has_replicas

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Write this rank's part of the sum over all ranks of a group.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        size, found = dist.get_world_size(group), torch.empty_like(input_tensor)
        begin = partial(dist.all_to_all_single, found, input_tensor, group=group, async_op=True)
        self._world.finish(self._world.start(begin))
        tree = PartTree[Tensor](size, torch.Tensor.add_)
        for rank, part in enumerate(found.view(size, -1)):
            tree.put(Node(0, rank), part)
        output_tensor.copy_(tree.total.view_as(output_tensor))
        if self._has_replicas:
            self._world.gather(None)
