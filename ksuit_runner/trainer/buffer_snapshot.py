"""Snapshots of a module's buffers, taken before every update and restored if it fails or is skipped."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.errors import CheckpointError
from ksuit_runner.tensors.foreach import copy_all
from ksuit_runner.tensors.layout import write
from ksuit_runner.tensors.module_tree import ModuleTree

LARGE = 1 << 18
"""Size in bytes from which on a buffer is copied only when torch counts a change of it."""


class BufferSnapshot:
    """Holds a copy of the buffers of a module, such as running statistics; taken again at every update.

    Args:
        module: The module; its forward pass may change buffers, replace them, or add some.

    Attributes:
        surveys: How often the buffers were found to be others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.surveys = 0
        self._tree = ModuleTree(module)
        self._copies: list[_BufferCopy] = []
        self._find_buffers()

    def take(self) -> None:
        """Take the snapshot anew."""
        if self._tree.has_changed():
            self._find_buffers()
        try:
            if self._small[0]:
                copy_all(*self._small)
        except RuntimeError:  # one has another shape by now
            self._copies = []
            self._find_buffers()
        for item in self._others:
            item.update()

    def restore(self) -> None:
        """Put the module's buffers back in place, with the values of the snapshot.

        Raises:
            CheckpointError: A large one was changed where torch does not count it.
        """
        known = {(id(holder), name) for holder, name in self._tree.buffer_slots}
        for holder, name in self._tree.buffer_slots_now():
            if (id(holder), name) not in known:
                del holder[name]
        with torch.no_grad():
            for (holder, name), item in self._slots():
                holder[name] = item.restored(name)

    def __len__(self) -> int:
        """Return the number of buffers."""
        return len(self._copies)

    @torch.no_grad()
    def reset(self) -> None:
        """Give the buffers the values of the snapshot, as ``restore`` does, for another part of the update."""
        are_others = any(
            holder.get(name) is not item.buffer or item.is_resized for (holder, name), item in self._slots()
        )
        if are_others or not all(_is_dense(item.buffer) for item in self._others):
            self.restore()
            return
        if self._small[0]:
            copy_all(self._small[1], self._small[0])
        for item in self._others:
            item.reset()

    def changes(self) -> Iterator[tuple[Tensor | None, Any]]:
        """Yield each buffer, or None if it has not changed or cannot be compared, and its value in the snapshot."""
        for (holder, name), item in self._slots():
            now = holder.get(name)
            yield (now if now is not None and item.may_differ(now) else None), item.copy

    def targets(self) -> Iterator[tuple[str, Tensor | None, Any]]:
        """Yield the name of each buffer, the buffer itself, and its value in the snapshot."""
        for (holder, name), item in self._slots():
            yield name, holder.get(name), item.copy

    def _slots(self) -> Iterator[tuple[tuple[dict[str, Tensor | None], str], "_BufferCopy"]]:
        return zip(self._tree.buffer_slots, self._copies, strict=True)

    def _find_buffers(self) -> None:
        self.surveys += 1
        if self._tree.has_other_structure():
            self._tree.survey()
            self._copies = []
        buffers = self._tree.buffers()
        before: list[Any] = self._copies or [None] * len(buffers)
        self._copies = [
            old if old and old.buffer is buffer else _BufferCopy(buffer, name)
            for old, buffer, (_, name) in zip(before, buffers, self._tree.buffer_slots, strict=True)
        ]
        small = [item for item in self._copies if item.is_small]
        self._small = [item.copy for item in small], [item.buffer for item in small]
        self._others = [item for item in self._copies if not item.is_small and item.buffer is not None]


class _BufferCopy:
    def __init__(self, buffer: Any, name: str) -> None:
        self.buffer = buffer
        # The kernels of normalization layers change their statistics without counting that.
        is_dense = buffer is not None and _is_dense(buffer)
        self.is_small = is_dense and (buffer.nbytes < LARGE or name.startswith("running_"))
        self.copy: Any = None if buffer is None else buffer.detach().clone()
        self._state = self._state_now()

    @property
    def is_resized(self) -> bool:
        """Whether the buffer has got another shape in place, as observers of fake quantization do at their first."""
        return self.buffer is not None and self.buffer.shape != self.copy.shape

    def update(self) -> None:
        if self._state_now() != self._state:
            self.copy = self.buffer.detach().clone()
            self._state = self._state_now()

    def reset(self) -> None:
        if self._state_now() != self._state:
            write(self.buffer, self.copy)
            self._state = self._state_now()

    def may_differ(self, now: Tensor) -> bool:
        if self.copy is None or not (_is_dense(now) and _is_dense(self.copy)):
            return False
        is_kept = now is self.buffer and not self.is_small and self._state_now() == self._state
        return not is_kept and (now.shape, now.dtype) == (self.copy.shape, self.copy.dtype)

    def restored(self, name: str) -> Any:
        buffer, copy = self.buffer, self.copy
        if buffer is None or (not self.is_small and self._state_now() == self._state):
            if buffer is not None and _is_dense(buffer) and not _is_equal(buffer, copy):
                raise CheckpointError(
                    f"the buffer '{name}' is changed through .data, where that cannot be seen, and is too large "
                    "to be copied at every update, so the update cannot be rolled back. Change it in place",
                    path="model",
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
