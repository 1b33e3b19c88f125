"""Data parallel training: every rank has the whole model, and computes the gradients of its parts of each batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ksuit_runner.config.types import PositiveFloat
from ksuit_runner.distributed.part_tree import Node
from ksuit_runner.distributed.prepare_model import share_weights, synchronize_batchnorm
from ksuit_runner.distributed.ranks import Ranks
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.tree_exchange import TreeExchange
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import KsuitError

_SMALL_BYTES = 1 << 18


class DataParallel(Strategy):
    """Trains with a copy of the model on each rank: ``strategy=ddp``.

    The gradients are added up in the order of ``PartTree``, so that they are the same to the bit on any number of
    ranks, which those of torch's ``DistributedDataParallel`` are not.

    Args:
        world: The processes that train the run together.
        bucket_mb: About how much of the gradients is exchanged at once, in megabytes.
        sync_batchnorm: Normalize by the statistics of all ranks, see ``synchronize_batchnorm``.
    """

    name = "ddp"

    def __init__(
        self, world: World | None = None, bucket_mb: PositiveFloat = 25.0, sync_batchnorm: bool = False
    ) -> None:
        super().__init__(world)
        self._sync_batchnorm = sync_batchnorm
        self._bucket_bytes = int(bucket_mb * 1e6)
        self._exchanges: dict[tuple[int, int], TreeExchange] = {}

    def wrap(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Give the model the weights and buffers of rank 0; see ``Strategy.wrap``.

        Raises:
            ConfigError: Batch normalization cannot be synchronized on this device.
        """
        share_weights(model, self.world)
        if self._sync_batchnorm and self.world.size > 1:
            synchronize_batchnorm(model)

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Take note of what ``reduce`` will get, see ``Strategy.bind``."""
        super().bind(tensors)
        self._exchanges.clear()

    @torch.no_grad()
    def reduce(
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        """Add up the gradients of all ranks, in buckets; see ``Strategy.reduce``."""
        if not isinstance(self.world, Ranks):
            return super().reduce(nodes, parts, word)
        key = parts, len(word)
        if key not in self._exchanges:
            self._exchanges[key] = TreeExchange(
                self.world, self.bound, parts, len(word), self._bucket_bytes, _SMALL_BYTES
            )
        for gradients in nodes.values():
            if any(gradient is not None and gradient.layout is not torch.strided for gradient in gradients):
                raise KsuitError("strategy=ddp adds up dense gradients only: set sparse=False where the model has them")
        return self._exchanges[key].add_up(nodes, word)
