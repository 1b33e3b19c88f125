"""The buffers of a module as they were before an update, to be given back if it fails or is left out."""

from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.errors import CheckpointError
from ksuit_runner.tensors.layout import write
from ksuit_runner.tensors.module_tree import ModuleTree

LARGE = 1 << 18
"""Size in bytes from which on a buffer is copied only when torch counts a change of it."""


class KeptBuffers:
    """Keeps the buffers of a module, such as running statistics, at every update.

    Args:
        module: The module; its forward pass may change buffers, assign them anew, or add some.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tree = ModuleTree(module)
        self._kept: list[_KeptBuffer] = []
        self._take()

    def keep(self) -> None:
        """Keep the buffers as they are."""
        if self._tree.has_changed():
            self._take()
        try:
            if self._small[0]:
                torch._foreach_copy_(*self._small)
        except RuntimeError:  # one has another shape by now
            self._kept = []
            self._take()
        for kept in self._others:
            kept.keep()

    def give_back(self) -> None:
        """Give the module the buffers back that were kept, with the values that they had.

        Raises:
            CheckpointError: A large one was changed where torch does not count it.
        """
        known = {(id(holder), name) for holder, name in self._tree.places}
        for holder, name in self._tree.places_now():
            if (id(holder), name) not in known:
                del holder[name]
        with torch.no_grad():
            for (holder, name), kept in zip(self._tree.places, self._kept, strict=True):
                holder[name] = kept.given_back(name)

    def _take(self) -> None:
        if self._tree.has_other_structure():
            self._tree.survey()
            self._kept = []
        buffers = self._tree.buffers()
        before: list[Any] = self._kept or [None] * len(buffers)
        self._kept = [
            old if old and old.buffer is buffer else _KeptBuffer(buffer, name)
            for old, buffer, (_, name) in zip(before, buffers, self._tree.places, strict=True)
        ]
        small = [kept for kept in self._kept if kept.is_small]
        self._small = [kept.copy for kept in small], [kept.buffer for kept in small]
        self._others = [kept for kept in self._kept if not kept.is_small and kept.buffer is not None]


class _KeptBuffer:
    def __init__(self, buffer: Any, name: str) -> None:
        self.buffer = buffer
        # The kernels of normalization layers change their statistics without counting that.
        is_dense = buffer is not None and _is_dense(buffer)
        self.is_small = is_dense and (buffer.nbytes < LARGE or name.startswith("running_"))
        self.copy: Any = None if buffer is None else buffer.detach().clone()
        self._state = self._state_now()

    def keep(self) -> None:
        if self._state_now() != self._state:
            self.copy = self.buffer.detach().clone()
            self._state = self._state_now()

    def given_back(self, name: str) -> Any:
        buffer, copy = self.buffer, self.copy
        if buffer is None or (not self.is_small and self._state_now() == self._state):
            if buffer is not None and _is_dense(buffer) and not _is_equal(buffer, copy):
                raise CheckpointError(
                    f"model: the buffer '{name}' is changed through .data, where that cannot be seen, and is too large "
                    "to be copied at every update: an update cannot be taken back. Change it in place"
                )
            return buffer
        if not _is_dense(buffer) or (buffer.shape, buffer.dtype) != (copy.shape, copy.dtype):
            return copy.clone()
        write(buffer, copy)
        self._state = self._state_now()
        return buffer

    def _state_now(self) -> Any:
        buffer = self.buffer
        return buffer is not None and (buffer._version, buffer.data_ptr() if _is_dense(buffer) else 0)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
