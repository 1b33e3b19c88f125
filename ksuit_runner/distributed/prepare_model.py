"""What ranks do to a model before they share its training."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from ksuit_runner.distributed.ranks import Ranks
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError


@torch.no_grad()
def share_weights(model: nn.Module, world: World) -> None:
    """Give a model the weights and buffers of rank 0."""
    if not isinstance(world, Ranks):
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        values = tensor.contiguous()
        world.finish(world.start(partial(dist.broadcast, values, 0, async_op=True)), values.device)
        tensor.copy_(values)


def synchronize_batchnorm(model: nn.Module) -> None:
    """Let batch normalization use the statistics of the parts that all ranks compute at a time, in place.

    Results then depend on the number of ranks, and all ranks have to compute the same number of parts.

    Args:
        model: The model, with the ``module`` that computes.

    Raises:
        ConfigError: The device of the model lacks it.
    """
    device = next((item.device for item in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        raise ConfigError("torch cannot do that on the CPU, only on GPUs", path="strategy.sync_batchnorm")
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model.module = convert(model.get_submodule("module"))  # type: ignore[no-untyped-call]
