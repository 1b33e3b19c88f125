"""A consistent copy of a run's state in host memory that every checkpoint reuses."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.checkpoint.tensor_file import FixedTensors
from ksuit_runner.tensors.foreach import copy_all

_LOGGER = logging.getLogger(__name__)
_ALIGNMENT = 64
_GROWTH = 16  # memory of a state that grows gets a sixteenth more, so that it does not grow at every checkpoint


class HostBuffers:
    """Copies dense tensors to the host, each time into the same memory.

    Training waits only for the copy. Reusing memory is several times faster than allocating it. A copy has the memory
    layout of its tensor, without overlaps and gaps.

    Attributes:
        size: Size of the last copy in bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._forms: list[Any] = []
        self._copies: list[Tensor] = []
        self._names: list[tuple[str, ...]] = []
        self._files: dict[str, FixedTensors] = {}
        self._devices: set[torch.device] = set()
        self._plain, self._pinned = _Memory(), _PinnedMemory()

    @torch.no_grad()
    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FixedTensors]:
        """Return copies of the tensors of several files; the next call overwrites them."""
        tensors = [*chain.from_iterable(file.values() for file in files.values())]
        forms = [(item.shape, item.stride(), item.dtype, item.device if item.is_cuda else None) for item in tensors]
        if forms != self._forms:
            self._lay_out(tensors)
            self._forms = forms
        if tensors and all(tensor.is_cpu for tensor in tensors):
            copy_all(self._copies, tensors)
        else:
            for copied, tensor in zip(self._copies, tensors, strict=True):
                copied.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in self._devices:
            torch.cuda.synchronize(device)
        if (names := [(name, *file) for name, file in files.items()]) != self._names:
            self._names, copies = names, iter(self._copies)
            self._files = {name: FixedTensors((key, next(copies)) for key in file) for name, file in files.items()}
        return dict(self._files)

    def _lay_out(self, tensors: Sequence[Tensor]) -> None:
        # They refer to the memory, which may be freed now.
        self._forms, self._names, self._copies, self._files = [], [], [], {}
        self._devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self.size = sum(tensor.nbytes for tensor in tensors)
        placed, ends = [], {self._plain: 0, self._pinned: 0}
        for tensor in tensors:
            memory = self._pinned if tensor.is_cuda else self._plain
            placed.append((memory, ends[memory]))
            ends[memory] += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
        blocks = {memory: memory.block(end) for memory, end in ends.items()}
        for tensor, (memory, start) in zip(tensors, placed, strict=True):
            strides = torch.empty_like(tensor, device="meta").stride()
            piece = blocks[memory][start : start + tensor.nbytes].view(tensor.dtype)
            self._copies.append(piece.as_strided(tensor.shape, strides))


class _Memory:
    """A block of host memory."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def block(self, size: int) -> Tensor:
        """Return at least so many bytes: the block as it is, unless it is too small, or more than twice as large."""
        held = self._block.nbytes
        if not size <= held <= 2 * size:
            self._free()
            self._block = self._allocate(size + (size // _GROWTH if 0 < held < size else 0))
        return self._block

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _free(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)


class _PinnedMemory(_Memory):
    """A block of memory to which a GPU copies behind the program.

    Torch's own pinned memory is rounded up to a power of two; so pages of our own are pinned here. They are shared with
    processes that are forked: else, on older kernels, what the GPU copies may not arrive in this one.
    """

    _unpin: "weakref.finalize[Any, Any] | None" = None

    def _allocate(self, size: int) -> Tensor:
        if size == 0:
            return super()._allocate(size)
        block = torch.frombuffer(mmap(-1, size), dtype=torch.uint8)
        if error := int(_driver().cudaHostRegister(block.data_ptr(), size, 0)):
            _LOGGER.warning("CUDA cannot pin %d bytes of memory (error %d): checkpoints take longer", size, error)
            with suppress(RuntimeError, AssertionError):  # else the next kernel of training would report that error
                torch.zeros(1, device="cuda")
        else:
            self._unpin = weakref.finalize(self, _unpin, block)
            self._unpin.atexit = False
        return block

    def _free(self) -> None:
        if self._unpin is not None:
            self._unpin()  # before it is freed
            self._unpin = None
        super()._free()


def _unpin(block: Tensor) -> None:
    _driver().cudaHostUnregister(block.data_ptr())


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
