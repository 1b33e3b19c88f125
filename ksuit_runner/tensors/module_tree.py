"""The current parameters and buffers of a module, looked up at every update at almost no cost."""

from collections.abc import Sequence, ValuesView
from copy import deepcopy
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn


class ModuleTree:
    """Finds the current parameters and buffers of a module, whatever was replaced since.

    A model may replace a buffer in its forward pass, and a callback a whole module. Walking the tree at every update
    would take as long as a small layer; so it holds views of the modules' dicts, which are read without leaving C.
    Their names (``_buffers``, ...) are private, but every pickled module contains them.

    Args:
        module: The module at the top.

    Attributes:
        buffer_slots: The dict of a module and the name in it of each buffer, as of the last survey.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.survey()

    def survey(self) -> None:
        """Walk the tree."""
        modules = list(self._module.modules())
        self._holders = [item._buffers for item in modules]
        self._children = [item._modules.values() for item in modules]
        self._parameters = [item._parameters.values() for item in modules]
        self._buffers = [item._buffers.values() for item in modules]
        self._all = [*self._children, *self._parameters, *self._buffers]
        self._seen = _values(self._all)
        self._structure = self._structure_now()
        self.buffer_slots = self.buffer_slots_now()

    def has_changed(self) -> bool:
        """Whether any module, parameter or buffer was replaced, added or removed since the last call."""
        before = self._seen
        self._seen = _values(self._all)
        return not are_same(self._seen, before)

    def has_other_structure(self) -> bool:
        """Whether modules or parameters were replaced, or buffers added or removed, since the last survey."""
        (objects, names), (before, names_before) = self._structure_now(), self._structure
        return names != names_before or not are_same(objects, before)

    def parameters(self) -> list[Any]:
        """Return all parameters in the order of the tree, with None for those that are registered as None."""
        return _values(self._parameters)

    def buffers(self) -> list[Any]:
        """Return all buffers in the order of the tree, with None for those that are registered as None."""
        return _values(self._buffers)

    def buffer_slots_now(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Return the dict of a module and the name in it of each buffer."""
        return [(holder, name) for holder in self._holders for name in holder]

    def _structure_now(self) -> tuple[list[Any], list[str]]:
        return [*_values(self._children), *_values(self._parameters)], list(chain.from_iterable(self._holders))


def are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


def _values(views: Sequence[ValuesView[Any]]) -> list[Any]:
    return list(chain.from_iterable(views))


def copy_rest(source: nn.Module, target: nn.Module, device: torch.device) -> None:
    """Give a module what another one of the same structure has besides parameters: buffers, extra state, modes.

    Args:
        source: The other module.
        target: The module.
        device: Device of its buffers.
    """
    for name, module in source.named_modules():
        own = target.get_submodule(name)
        for key, buffer in module._buffers.items():
            own._buffers[key] = None if buffer is None else buffer.detach().to(device, copy=True)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            own.set_extra_state(deepcopy(module.get_extra_state()))
        own.training = module.training
