"""Exponential moving averages of the weights."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.checkpoint.format import read_weights
from ksuit_runner.checkpoint.tensor_file import fits_file
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import local
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.tensors.foreach import copy_all, lerp_all
from ksuit_runner.tensors.layout import Strides, overlaps, same_form, write
from ksuit_runner.tensors.module_tree import ModuleTree


class Ema(CallbackBase):
    """Maintains averages of the weights, one per decay, and offers them for evaluation beside the live ones.

    Parameters are averaged. Buffers, such as running statistics, are copied from the live model: they may be counts or
    masks with infinities, which have no average.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; the warm-up of the decay,
    min(decay, (1 + n) / (10 + n)) at the n-th update, is that of TensorFlow's ExponentialMovingAverage.

    Args:
        decays: Decay of each average, between 0 and 1. Metrics of a single one end in ``/NAME``, those of several in
            ``/NAME_DECAY``, where NAME is the name of the callback.
        warmup: Start with smaller decays, so that the average soon forgets the random weights it started from.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: There is no decay, one twice, or one that is not between 0 and 1.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, decays: Sequence[float] = (0.99,), warmup: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not decays or len(set(decays)) < len(decays) or not all(0 < decay < 1 for decay in decays):
            raise ConfigError(f"decays: different numbers between 0 and 1 are needed, not {list(decays)}")
        self.warmup = warmup
        self.updates = 0
        name = self.display_name
        self.decays = {name if len(decays) == 1 else f"{name}_{decay}": decay for decay in decays}
        self.models = {label: self._copy() for label in self.decays}
        for label, average in self.models.items():
            self.trainer.add_evaluation_model(label, average)
            self.checkpoint_writer.add_tensors(label, partial(_in_file, average), of_model=True)
        self._strides: dict[str, Strides] = {}
        self._pair()

    def _before_training(self, update_counter: UpdateCounter) -> None:
        if self.updates == 0:  # the weights may have been loaded since, in a run that had no average before
            for average in self.models.values():
                average.module = self._copy().module
            self._pair()

    @quiet
    @uses_no_rng
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        self.updates += 1
        has_changed = self._live.tree.has_changed()
        if has_changed and self._live.tree.has_other_structure():
            self._follow()
        for label, average in self._averages.items():
            average.move_towards(self._live, self._decay(self.decays[label]), has_changed)

    def _copy(self) -> ModelBase:
        return self.model.copy().eval().requires_grad_(False)

    def _pair(self) -> None:
        """Pair the tensors of the averages with those of the model."""
        self._live = _Tensors(self.model.module)
        self._averages = {label: _Tensors(average.module) for label, average in self.models.items()}

    def _follow(self) -> None:
        """Replace what was replaced in the model; an average continues under its name or starts anew."""
        for average in self.models.values():
            before = dict(average.module.named_parameters())
            average.module = self._copy().module
            for name, parameter in average.module.named_parameters():
                if name in before and before[name].shape == parameter.shape and _has_average(parameter):
                    write(local(parameter), local(before[name]))
        self._pair()

    def _decay(self, decay: float) -> float:
        return min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay

    def state_dict(self) -> dict[str, Any]:
        """Return the number of averaged updates, and the memory layouts of the averages; their values are in files."""
        strides = {label: average.arrangement()["strides"] for label, average in self.models.items()}
        return {"updates": self.updates, "strides": strides}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the number of averaged updates and the layouts."""
        self.updates, self._strides = state_dict["updates"], state_dict.get("strides", {})

    def resume_from_checkpoint(self, resumption_paths: PathProvider, model: ModelBase) -> None:
        """Restore the averages from the checkpoint's files; what has no average and is in no file is the model's."""
        for label, average in self.models.items():
            path = resumption_paths.checkpoint_dir / f"{label}.safetensors"
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", path=f"callbacks.{self.name}")
            average.module = self._copy().module
            average.load({**average.tensors(), **read_weights(path.parent, label)}, average.arrangement())
            if label in self._strides:
                average.arrange({**average.arrangement(), "strides": self._strides[label]})
        self._pair()


class _Tensors:
    """The tensors of the model or of an average, in the same order for both; what this rank holds of them."""

    def __init__(self, module: nn.Module) -> None:
        self.tree = ModuleTree(module)
        held = list({id(item): item for item in self.tree.parameters() if item is not None}.values())
        self.averaged = [local(item) for item in held if _has_average(item)]
        self.others = [item for item in held if not _has_average(item)]
        self.extra = [item for item in module.modules() if type(item).get_extra_state is not nn.Module.get_extra_state]
        self._buffers: tuple[list[Tensor], list[Tensor]] | None = None  # of this one, and of the other

    def move_towards(self, live: "_Tensors", decay: float, has_changed: bool) -> None:
        """Average the parameters, and copy what has no average: other parameters, buffers, and extra state.

        Args:
            live: The tensors of the model.
            decay: Share of the previous average.
            has_changed: Whether a buffer of the model may have been replaced.
        """
        if self.averaged:
            lerp_all(self.averaged, live.averaged, 1 - decay)
        for parameter, other in zip(self.others, live.others, strict=True):
            parameter.data = _copied(other.detach(), parameter.detach())
        if has_changed or self._buffers is None or (self.tree.buffer_slots and self.tree.has_changed()):
            self._copy_buffers(live.tree.buffers())
        elif self._buffers[0]:
            copy_all(*self._buffers)
        for module, source in zip(self.extra, live.extra, strict=True):
            module.set_extra_state(deepcopy(source.get_extra_state()))

    def _copy_buffers(self, buffers: list[Any]) -> None:
        pairs = []
        for (holder, name), other in zip(self.tree.buffer_slots, buffers, strict=True):
            copied = holder[name] = _copied(other, holder[name])
            pairs += [] if copied is None else [(copied, other)]
        are_plain = all(own.layout == torch.strided and not overlaps(own) for own, _ in pairs)
        self._buffers = ([own for own, _ in pairs], [other for _, other in pairs]) if are_plain else None
        self.tree.has_changed()  # what was just replaced does not count as a change


def _has_average(parameter: Tensor) -> bool:
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return is_number and parameter.layout == torch.strided


def _copied(value: Any, old: Any) -> Any:
    """Return a copy of a tensor, in the memory of an old one of the same form if there is one; None for None."""
    if value is None:
        return None
    if old is not None and value.layout == torch.strided and same_form(value, old):
        return write(old, value)
    return value.detach().clone()


def _in_file(average: ModelBase) -> dict[str, Tensor]:
    return {name: value for name, value in average.tensors().items() if fits_file(value)}
