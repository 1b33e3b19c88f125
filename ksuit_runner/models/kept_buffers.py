"""The buffers of a module as they were before it computed in evaluation mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ksuit_runner.errors import named_type
from ksuit_runner.tensors.layout import same_form, write
from ksuit_runner.tensors.module_tree import ModuleTree

_LOGGER = logging.getLogger(__name__)
_Key = tuple[int, str]


class KeptBuffers:
    """Puts back what a module changes in its buffers although it is in evaluation mode.

    The observers of fake quantization do so, and modules that count or average without asking for their mode: what
    was evaluated, and how often, would change training. A module in training mode within one that is not is meant to
    change its buffers, and so is what writes to them between two forward passes. What a forward pass notes in
    attributes of modules cannot be undone: buffers that have changed together with a number or a flag there, as where a
    table is filled at the first call, stay as they are.

    All buffers are copied before the first forward pass that they are seen in, and compared after it, since some
    kernels, such as that of fused fake quantization, change them without torch counting it. From then on only those are
    copied that have changed: as a rule none.

    Attributes:
        is_used: Whether somebody calls ``put_back`` in time; nothing is kept otherwise, as of a teacher that only
            updates compute with.
        kept: What is to be put back.
    """

    def __init__(self) -> None:
        self.is_used = False
        self._module: nn.Module | None = None
        self._tree: ModuleTree | None = None
        self._slots: list[tuple[nn.Module, str]] = []
        self._known: set[_Key] = set()
        self._changing: set[_Key] = set()
        self._is_watching = False
        self.kept: dict[_Key, _Kept] = {}

    def __reduce__(self) -> tuple[type[KeptBuffers], tuple[()]]:
        return KeptBuffers, ()  # a copy has kept nothing

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Keep what a forward pass of the module in the block changes, until ``put_back``."""
        if self._is_watching or not self.is_used:  # within a step that uses parts of the module, it is watched already
            yield
            return
        self._find_slots(module)
        before = [self._before(*slot) for slot in self._slots]
        notes = self._notes() if self.kept or any(copy is not None for _, _, copy in before) else None
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
            changed = [
                (module, name, buffer, copy, now)
                for (module, name), (buffer, version, copy) in zip(self._slots, before, strict=True)
                if buffer is not None
                and (now := module._buffers.get(name)) is not None
                and (now is not buffer or _version(now) != version or self._has_other_values(module, name, now, copy))
            ]
            if changed and notes is not None and self._notes() != notes:
                for module, name, *_ in changed:
                    self.kept.pop((id(module), name), None)
                    self._changing.add((id(module), name))
            else:
                for each in changed:
                    self._note(*each)

    def put_back(self) -> None:
        """Give the buffers what they were before the forward passes since the last call, if these have changed them."""
        if not self.kept:
            return
        # Those that share memory count their changes together: what is written to one would be taken for such of all.
        as_left = [item for item in self.kept.values() if item.is_as_left()]
        with torch.no_grad():
            for module, name, buffer, copy, *_ in as_left:
                if buffer.layout == torch.strided and not buffer.is_quantized and same_form(buffer, copy):
                    module._buffers[name] = write(buffer, copy)
                else:
                    module._buffers[name] = copy
        self.kept.clear()

    def _find_slots(self, module: nn.Module) -> None:
        if self._tree is None or module is not self._module:
            self._module, self._tree = module, ModuleTree(module)
            self._known, self._changing = set(), set()
        elif not self._tree.has_changed():
            return
        else:
            self._tree.survey()
        self._slots = [(item, name) for item in module.modules() for name in item._buffers]

    def _notes(self) -> list[dict[str, Any]]:
        """Return what the modules have noted in numbers, flags and texts."""
        assert self._module is not None
        return [notes_of(item) for item in self._module.modules()]

    def _before(self, module: nn.Module, name: str) -> tuple[Tensor | None, int, Tensor | None]:
        """Return a buffer that is to stay as it is, its version, and a copy where it may be needed."""
        buffer, key = module._buffers.get(name), (id(module), name)
        if buffer is None or module.training or is_lazy(buffer):
            return None, 0, None
        if key in self.kept and not self.kept[key].is_as_left():
            del self.kept[key]
        is_needed = key not in self.kept and (key in self._changing or key not in self._known)
        self._known.add(key)
        return buffer, _version(buffer), buffer.detach().clone() if is_needed else None

    def _has_other_values(self, module: nn.Module, name: str, now: Tensor, copy: Tensor | None) -> bool:
        """Whether a buffer that counts no change may have changed; only values say so, which waits for a device."""
        if copy is None:
            return False
        try:
            return (id(module), name) in self._changing or not torch.equal(now, copy)
        except RuntimeError:  # of one that is sparse, or in a transformation of functions, there is no such comparison
            return False

    def _note(self, module: nn.Module, name: str, buffer: Tensor, copy: Tensor | None, now: Tensor) -> None:
        key = (id(module), name)
        if now is not buffer and not same_form(now, buffer):
            return  # a cache that has grown: something else in the module may count on it
        if key in self.kept:
            self.kept[key] = self.kept[key]._replace(now=now, version=_version(now))
        elif copy is not None:
            self.kept[key] = _Kept(module, name, buffer, copy, now, _version(now))
        else:
            _LOGGER.warning(
                "the buffer '%s' of %s has changed in evaluation, for the first time, and stays so",
                *(name, named_type(module)),
            )
        self._changing.add(key)


class _Kept(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    copy: Tensor
    now: Tensor
    version: int

    def is_as_left(self) -> bool:
        """Whether nobody has written to the buffer since the forward pass."""
        return self.module._buffers.get(self.name) is self.now and _version(self.now) == self.version


def notes_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module, without those in it, has noted in numbers, flags and texts."""
    return {name: value for name, value in vars(module).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _version(tensor: Tensor) -> int:
    """Return how many changes of a tensor torch has counted; those of inference mode have no such count."""
    return 0 if tensor.is_inference() else tensor._version
