"""The buffers of a module as they were before it computed in evaluation mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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

    All buffers are copied before the first forward pass that they are seen in, and from then on those that have
    changed: as a rule none.

    Args:
        module: The module.

    Attributes:
        kept: What is to be put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tree: ModuleTree | None = None
        self._slots: list[tuple[nn.Module, str]] = []
        self._known: set[_Key] = set()
        self._changing: set[_Key] = set()
        self.kept: dict[_Key, _Kept] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptBuffers:
        return KeptBuffers(deepcopy(self._module, memo))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what a forward pass in the block changes, until ``put_back``."""
        self._find_slots()
        before = [self._before(*slot) for slot in self._slots]
        notes = self._notes() if self.kept or any(copy is not None for _, _, copy in before) else None
        try:
            yield
        finally:
            changed = [
                (module, name, buffer, copy, now)
                for (module, name), (buffer, version, copy) in zip(self._slots, before, strict=True)
                if buffer is not None
                and (now := module._buffers.get(name)) is not None
                and (now is not buffer or now._version != version)
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
        with torch.no_grad():
            for module, name, buffer, copy, now, version in self.kept.values():
                if not _is_as_left(module._buffers.get(name), now, version):
                    continue
                if buffer.layout == torch.strided and not buffer.is_quantized and same_form(buffer, copy):
                    module._buffers[name] = write(buffer, copy)
                else:
                    module._buffers[name] = copy
        self.kept.clear()

    def _find_slots(self) -> None:
        if self._tree is None:
            self._tree = ModuleTree(self._module)
        elif not self._tree.has_changed():
            return
        else:
            self._tree.survey()
        self._slots = [(module, name) for module in self._module.modules() for name in module._buffers]

    def _notes(self) -> list[dict[str, Any]]:
        """Return what the modules have noted in numbers, flags and texts."""
        modules = self._module.modules()
        return [{name: value for name, value in vars(item).items() if _is_plain(value)} for item in modules]

    def _before(self, module: nn.Module, name: str) -> tuple[Tensor | None, int, Tensor | None]:
        """Return a buffer that is to stay as it is, its version, and a copy where it may be needed."""
        buffer, key = module._buffers.get(name), (id(module), name)
        if buffer is None or module.training or is_lazy(buffer):
            return None, 0, None
        if key in self.kept and not _is_as_left(buffer, *self.kept[key][-2:]):
            del self.kept[key]
        is_needed = key not in self.kept and (key in self._changing or key not in self._known)
        self._known.add(key)
        return buffer, buffer._version, buffer.detach().clone() if is_needed else None

    def _note(self, module: nn.Module, name: str, buffer: Tensor, copy: Tensor | None, now: Tensor) -> None:
        key = (id(module), name)
        if now is not buffer and not same_form(now, buffer):
            return  # a cache that has grown: something else in the module may count on it
        if key in self.kept:
            self.kept[key] = self.kept[key]._replace(now=now, version=now._version)
        elif copy is not None:
            self.kept[key] = _Kept(module, name, buffer, copy, now, now._version)
        else:
            kind = type(module).__name__
            _LOGGER.warning("model: the buffer '%s' of a %s has changed in evaluation, for the first time", name, kind)
        self._changing.add(key)


class _Kept(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    copy: Tensor
    now: Tensor
    version: int


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _is_as_left(buffer: Tensor | None, now: Tensor, version: int) -> bool:
    """Whether nobody has written to a buffer since a forward pass."""
    return buffer is now and now._version == version
