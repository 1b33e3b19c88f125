"""A consistent copy of a run's state in host memory, in buffers that every checkpoint reuses."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor


class HostBuffers:
    """Copies dense tensors to the host, each time into the same buffers.

    Training waits only for the copy. Reusing memory is several times faster than allocating it. A copy has the memory
    layout of its tensor, without overlaps and gaps.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._spare: deque[Tensor] = deque()  # of the last copy, not yet reused by this one

    @property
    def size(self) -> int:
        """Size of the last copy in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return copies of the tensors of several files; the next call overwrites them."""
        self._spare, self._buffers = deque(self._buffers), []
        copied = {
            name: {key: self._copy(tensor.detach()) for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._spare.clear()
        return copied

    def _copy(self, tensor: Tensor) -> Tensor:
        buffer = self._spare.popleft() if self._spare else None
        if buffer is None or not _has_form(buffer, tensor):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._buffers.append(buffer)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


def _has_form(buffer: Tensor, tensor: Tensor) -> bool:
    form = (tensor.shape, tensor.dtype, tensor.is_cuda)
    return form == (buffer.shape, buffer.dtype, buffer.is_pinned()) and buffer.stride() == tensor.stride()
