"""The memory layout of tensors: torch chooses kernels by it, so an exact resume has to restore it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn

Strides = dict[str, tuple[int, ...]]


def unusual_strides(tensors: Iterable[tuple[str, Tensor]]) -> Strides:
    """Return the strides of the tensors that are not row-major, by name."""
    return {
        name: tensor.stride()
        for name, tensor in tensors
        if tensor.layout == torch.strided and tensor.stride() != row_major(tensor.shape)
    }


def lay_out(tensors: Iterable[tuple[str, Tensor]], strides: Mapping[str, Sequence[int]]) -> None:
    """Change the strides of tensors and keep their values; those that are not named become row-major."""
    for name, tensor in tensors:
        if tensor.layout == torch.strided:
            wanted = tuple(strides.get(name) or row_major(tensor.shape))
            if tensor.stride() != wanted:
                laid_out = torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device)
                tensor.data = write(laid_out, tensor.detach())


def lay_out_channels_last(module: nn.Module) -> None:
    """Change what has two or three spatial dimensions to channels last, where channels come first by name."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.ndim in formats and tensor.layout == torch.strided:
            tensor.data = tensor.detach().contiguous(memory_format=formats[tensor.ndim])


def write(tensor: Tensor, values: Tensor) -> Tensor:
    """Write values into a tensor, also into one whose elements share memory because it was expanded."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    tensor[once].copy_(values[once])
    return tensor


def same_form(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and layout, so that one can be copied into the other."""
    return (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor, so that torch refuses to write into it."""
    is_strided = tensor.layout == torch.strided
    return is_strided and any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


@lru_cache(maxsize=1024)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
