"""Exponential moving averages of the weights, evaluated beside the live ones."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.random_keys import draws_nothing


class Ema(CallbackBase):
    """Keeps averages of the weights, one per decay, and offers them for evaluation.

    Parameters are averaged. Buffers, such as running statistics, are those of the live model: they may be counts or
    masks with infinities, of which there is no average.

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
        self.models = {label: deepcopy(self.model).eval().requires_grad_(False) for label in self.decays}
        for label, average in self.models.items():
            self.trainer.add_evaluation_model(label, average)
            self.checkpoint_writer.add_tensors(label, average.tensors)
        self._live = _tensors(self.model)
        self._averages = {label: _tensors(average) for label, average in self.models.items()}

    def _before_training(self, update_counter: UpdateCounter) -> None:
        if self.updates == 0:  # the weights may have been loaded since: into a run that had no average before
            for average in self.models.values():
                average.load_state_dict(self.model.state_dict())

    @draws_nothing
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        self.updates += 1
        parameters, others = self._live
        for label, (averages, copies) in self._averages.items():
            torch._foreach_lerp_(averages, parameters, 1 - self._decay(self.decays[label]))
            for copy, other in zip(copies, others, strict=True):
                copy.copy_(other)

    def _decay(self, decay: float) -> float:
        return min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay

    def state_dict(self) -> dict[str, Any]:
        """Return the number of averaged updates; the weights are in files of their own."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the number of averaged updates."""
        self.updates = state_dict["updates"]

    def resume_from_checkpoint(self, resumption_paths: PathProvider, model: ModelBase) -> None:
        """Read the averages from the checkpoint's files."""
        for label, average in self.models.items():
            path = resumption_paths.checkpoint_dir / f"{label}.safetensors"
            if not path.is_file():
                raise CheckpointError(f"callbacks.{self.display_name}: {path} is missing")
            average.module.load_state_dict(safetensors.torch.load_file(path))


def _tensors(model: ModelBase) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is averaged, a parameter with several names only once, and what is copied."""
    averaged: list[Tensor] = []
    copied = list(model.buffers())
    for parameter in model.parameters():
        (averaged if parameter.is_floating_point() or parameter.is_complex() else copied).append(parameter)
    return averaged, copied
