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


class Ema(CallbackBase):
    """Keeps averages of the weights, one per decay, and offers them for evaluation.

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
        self.models: dict[str, ModelBase] = {}
        self.decays: dict[str, float] = {}
        for decay in decays:
            label = self.name if len(decays) == 1 else f"{self.name}_{decay:g}"
            average = deepcopy(self.model).eval().requires_grad_(False)
            self.models[label], self.decays[label] = average, decay
            self.trainer.add_evaluation_model(label, average)
            self.checkpoint_writer.add_tensors(label, average.tensors)
        self._live = self._tensors(self.model)
        self._averages = {label: self._tensors(average) for label, average in self.models.items()}

    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        self.updates += 1
        floats, others = self._live
        for label, (average_floats, average_others) in self._averages.items():
            torch._foreach_lerp_(average_floats, floats, 1 - self._decay(self.decays[label]))
            for average, live in zip(average_others, others, strict=True):
                average.copy_(live)

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
                raise CheckpointError(f"callbacks.{self.name}: {path} is missing")
            average.module.load_state_dict(safetensors.torch.load_file(path))

    @staticmethod
    def _tensors(model: ModelBase) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that are averaged, and those that are copied since they are no real numbers."""
        tensors = list(model.tensors().values())
        return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
