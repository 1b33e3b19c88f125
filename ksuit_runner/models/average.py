"""The tensors of a model and of an average of it, in pairs."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.distributed.pieces import is_sharded, local
from ksuit_runner.tensors.foreach import copy_all, lerp_all
from ksuit_runner.tensors.layout import overlaps, same_form, write
from ksuit_runner.tensors.module_tree import ModuleTree


class ModelTensors:
    """The tensors of the model or of an average, in the same order for both; what this rank holds of them.

    Args:
        module: The module.
        chosen: Names of the modules in it whose tensors are averaged; None averages all.
        averages_buffers: Whether their buffers of floating-point numbers are averaged, too.
    """

    def __init__(self, module: nn.Module, chosen: Sequence[str] | None = None, averages_buffers: bool = False) -> None:
        self.tree = ModuleTree(module)
        of_chosen = chosen_parameters(module, chosen)
        held = list({id(item): item for item in self.tree.parameters() if item is not None}.values())
        self.averaged = [local(item) for item in held if id(item) in of_chosen and has_average(item)]
        self.others = [item for item in held if id(item) in of_chosen and not has_average(item)]
        self.copied = [local(item) for item in held if id(item) not in of_chosen and is_sharded(item)]
        self.extra = [item for item in module.modules() if type(item).get_extra_state is not nn.Module.get_extra_state]
        self._buffers: tuple[list[Tensor], list[Tensor]] | None = None  # of this one, and of the other
        self._averaged_buffers = {
            id(item._buffers) for name, item in module.named_modules() if averages_buffers and is_in(name, chosen)
        }

    def move_towards(self, live: "ModelTensors", share: float | None, has_changed: bool) -> None:
        """Average the tensors, and copy what has no average: other parameters, buffers, and extra state.

        Args:
            live: The tensors of the model.
            share: Share of the live ones in the new average; None only copies what has no average.
            has_changed: Whether a buffer of the model may have been replaced.
        """
        if share is not None and self.averaged:
            lerp_all(self.averaged, live.averaged, share)
        if self.copied:
            copy_all(self.copied, live.copied)
        for parameter, other in zip(self.others, live.others, strict=True):
            parameter.data = _copied(other.detach(), parameter.detach())
        if has_changed or self._buffers is None or (self.tree.buffer_slots and self.tree.has_changed()):
            self._move_buffers(live.tree.buffers(), share)
        elif self._buffers[0]:
            copy_all(*self._buffers)
        for module, source in zip(self.extra, live.extra, strict=True):
            module.set_extra_state(deepcopy(source.get_extra_state()))

    def _move_buffers(self, buffers: list[Any], share: float | None) -> None:
        pairs, are_plain = [], not self._averaged_buffers
        for (holder, name), other in zip(self.tree.buffer_slots, buffers, strict=True):
            own: Any = holder[name]
            if id(holder) in self._averaged_buffers and _fits(own, other):
                if share is not None:
                    _average(own, other, share)
                continue
            copied = holder[name] = _copied(other, own)
            pairs += [] if copied is None else [(copied, other)]
        are_plain = are_plain and all(own.layout == torch.strided and not overlaps(own) for own, _ in pairs)
        self._buffers = ([own for own, _ in pairs], [other for _, other in pairs]) if are_plain else None
        self.tree.has_changed()  # what was just replaced does not count as a change


def share_the_rest(average: nn.Module, live: nn.Module, chosen: Sequence[str] | None) -> None:
    """Let an average have the very parameters of the model where it does not average: they take no memory and no time.

    Those that are spread over ranks cannot be in two modules; ``ModelTensors`` copies them.

    Args:
        average: A copy of the model.
        live: The model.
        chosen: Names of the modules whose tensors are averaged; None averages all.
    """
    kept = chosen_parameters(live, chosen)
    for module, source in zip(average.modules(), live.modules(), strict=True):
        for name, parameter in source._parameters.items():
            if parameter is not None and id(parameter) not in kept and not is_sharded(parameter):
                module._parameters[name] = parameter


def chosen_parameters(module: nn.Module, chosen: Sequence[str] | None) -> set[int]:
    """Return the ids of the parameters in any of the chosen modules, also if other modules have them, too."""
    named = module.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if is_in(name, chosen)}


def is_in(name: str, chosen: Sequence[str] | None) -> bool:
    """Whether a module, parameter or buffer is in, or is, one of the chosen modules; None are all."""
    return chosen is None or any(name == module or name.startswith(f"{module}.") for module in chosen)


def has_average(parameter: Tensor) -> bool:
    """Whether a tensor is one of plain numbers that can be averaged."""
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return is_number and parameter.layout == torch.strided


def _fits(own: Any, other: Any) -> bool:
    if own is None or other is None:
        return False
    return has_average(other) and same_form(own, other) and not overlaps(own)


def _average(own: Tensor, other: Tensor, share: float) -> None:
    """Move a buffer towards another one; where both have the same infinity, as in a mask, that stays."""
    own.copy_(torch.where(own == other, own, own.lerp(other, share)))


def _copied(value: Any, old: Any) -> Any:
    """Return a copy of a tensor, in the memory of an old one of the same form if there is one; None for None."""
    if value is None:
        return None
    if old is not None and value.layout == torch.strided and same_form(value, old):
        return write(old, value)
    return value.detach().clone()
