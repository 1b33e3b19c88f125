"""The fused kernels of torch's optimizers: where there are any, and what they ask of the memory of tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from ksuit_runner.distributed.pieces import is_sharded

FUSED_DEVICES = ("cpu", "cuda", "mps")


def may_fuse(factory: Callable[..., Optimizer], parameters: Iterable[Tensor]) -> bool:
    """Whether torch knows the fused kernel of an optimizer for such parameters: spread over ranks only that of Adam."""
    kind = getattr(factory, "func", factory)
    return (isinstance(kind, type) and issubclass(kind, Adam | AdamW)) or not any(map(is_sharded, parameters))


def fits_kernels(group: Mapping[str, Any]) -> bool:
    """Whether fused kernels, which go through memory from end to end, can work on the parameters."""
    parameters = [parameter for _, parameter in group["params"]]
    return all(parameter.is_floating_point() and _lie_alike(parameter, parameter) for parameter in parameters)


def lay_out_for_fused_kernels(optimizer: Optimizer) -> None:
    """Give state the memory layout of its parameter where fused kernels pair the two by their offset in memory.

    They differ if the parameter's layout was changed, or if the state was stored without its layout.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not _lie_alike(value, parameter):
                    state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return one.layout != torch.strided or one.stride() == torch.empty_like(other).stride()
