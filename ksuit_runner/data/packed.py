"""Pickling datasets for a worker process that is not a fork of this one."""

from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch
from torch import Tensor

_LARGE: Final = 1 << 20
_MOST_SHARED: Final = 128


def pack(value: Any) -> bytes:
    """Pickle a value for a process that is being started.

    Torch shares the memory of each tensor, as a file descriptor. But a process that Python's fork server starts takes
    256 of them at most, and a dataset may be a list of thousands of tensors: small ones are copied instead.
    """
    buffer = BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class _Pickler(ForkingPickler):
    _shared = 0

    def reducer_override(self, value: Any) -> Any:
        is_plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or value.requires_grad or value.is_quantized:
            return NotImplemented
        if value.untyped_storage().nbytes() >= _LARGE and self._shared < _MOST_SHARED:
            self._shared += 1
            return NotImplemented
        return _rebuild, _taken_apart(value)


def _taken_apart(tensor: Tensor) -> tuple[Any, ...]:
    """Return the values of a tensor row by row, and what else it takes to make one with the same strides."""
    dense = tensor.clone()  # without the rest of its storage
    order = sorted(range(dense.ndim), key=lambda dimension: -dense.stride()[dimension])
    rows = dense.permute(order).contiguous().reshape(-1).view(torch.uint8)
    return rows.numpy(), dense.dtype, [dense.shape[dimension] for dimension in order], order


def _rebuild(values: Any, dtype: torch.dtype, shape: list[int], order: list[int]) -> Tensor:
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.from_numpy(values).view(dtype).reshape(shape).permute(places)
