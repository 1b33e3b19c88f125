"""A consistent copy of a run's state in host memory that is used again for every checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """Copies trees of tensors to the host, each time into the same buffers.

    Training waits only for the copy. Writing into memory that exists is several times faster than allocating it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._last: set[str] = set()

    @property
    def size(self) -> int:
        """Size of the last copy in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, tree: Any) -> Any:
        """Return the tree with every tensor copied; it stays as it is until the next call.

        Args:
            tree: Nested dicts, lists and tuples of tensors and plain values.
        """
        self._last = set()
        copied = self._copy(tree, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for path in self._buffers.keys() - self._last:
            del self._buffers[path]
        return copied

    def _copy(self, tree: Any, path: str) -> Any:
        if isinstance(tree, Tensor):
            return self._copy_tensor(tree.detach(), path)
        if isinstance(tree, Mapping):
            return {key: self._copy(value, f"{path}/{key}") for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._copy(value, f"{path}/{i}") for i, value in enumerate(tree)])
        return tree

    def _copy_tensor(self, tensor: Tensor, path: str) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        self._last.add(path)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
