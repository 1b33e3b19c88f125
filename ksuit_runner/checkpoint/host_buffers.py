"""A consistent copy of a run's state in host memory, in buffers that every checkpoint reuses."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """Copies trees of tensors to the host, each time into the same buffers.

    Training waits only for the copy. Reusing memory is several times faster than allocating it. A copy has the memory
    layout of its tensor, without overlaps and gaps.

    Attributes:
        kinds: Types of the values of the last copy, in their order.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._spare: deque[Tensor] = deque()  # of the last copy, not yet reused by this one
        self.kinds: list[Any] = []

    @property
    def size(self) -> int:
        """Size of the last copy in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def copy(self, tree: Any) -> Any:
        """Return the tree with every tensor copied; the next call overwrites the copies.

        Args:
            tree: Nested dicts, lists and tuples of tensors and plain values.
        """
        self._spare, self._buffers, self.kinds = deque(self._buffers), [], []
        copied = self._copy(tree)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._spare.clear()
        return copied

    def _copy(self, tree: Any) -> Any:
        kind = type(tree)
        if kind is dict:
            return {key: self._copy(value) for key, value in tree.items()}
        if kind is list or kind is tuple:
            return kind([self._copy(value) for value in tree])
        if isinstance(tree, Tensor):
            self.kinds.append((tree.dtype, tree.layout))
            return self._copy_tensor(tree.detach())
        self.kinds.append(kind)
        return tree

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            return tensor.cpu().clone()
        buffer = self._spare.popleft() if self._spare else None
        if buffer is None or not _has_form(buffer, tensor):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._buffers.append(buffer)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def _has_form(buffer: Tensor, tensor: Tensor) -> bool:
    form = (tensor.shape, tensor.dtype, tensor.is_cuda)
    return form == (buffer.shape, buffer.dtype, buffer.is_pinned()) and buffer.stride() == tensor.stride()
