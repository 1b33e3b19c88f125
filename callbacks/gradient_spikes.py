"""Updates in which the gradient of a module is far larger than usual."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.norms import NormsCallback
from ksuit_runner.config.types import AboveOne, OpenFraction, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.module_norms import gradient
from ksuit_runner.trainer.sums import to_device


class GradientSpikes(NormsCallback):
    """Warns of modules whose gradient norm is a multiple of its running mean, and logs how often that happens.

    ``gradient_spikes`` is the number of updates since the last log in which any module had a spike. For each module
    that had one, ``gradient_spikes/MODULE`` is its largest norm divided by its running mean at that time; the warning
    names the update as well. A gradient that is not finite is a spike of infinite size, except in float16, whose
    scaling meets such gradients while it looks for its factor.

    It looks at every update, and waits for the device only when it logs. A spike enters the running mean as ``factor``
    times that mean, so that it does not hide the next one, while a lasting rise becomes the new normal. It only
    reports: ``trainer.clip_norm`` limits what a spike does.

    Args:
        factor: What multiple of its mean a norm has to exceed.
        decay: Decay of the running mean, between 0 and 1: 0.98 is about the last 50 updates.
        warmup: Number of updates with a gradient before a module is judged.
        **kwargs: Passed on to NormsCallback: which modules.

    Raises:
        ConfigError: A number is out of its range.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_spikes", "gradient_spikes/*")
    is_repeatable: ClassVar[bool] = False
    replaces_state: ClassVar[bool] = True

    def __init__(
        self, factor: AboveOne = 5.0, decay: OpenFraction = 0.98, warmup: PositiveInt = 20, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("AboveOne", factor=factor)
        check_numbers("OpenFraction", decay=decay)
        check_numbers("PositiveInt", warmup=warmup)
        self._factor, self._decay, self._warmup = factor, decay, warmup
        size, device = len(self.norms.groups), self.trainer.device
        self._mean = torch.zeros(size, device=device)
        self._seen, self._when = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._start_interval()

    def _start_interval(self) -> None:
        self._largest = torch.zeros_like(self._mean)
        self._count = torch.zeros_like(self._seen[0])

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        norms = self.norms.row(gradient)
        if self.trainer.scaler.is_enabled():
            norms = norms.nan_to_num(0.0, 0.0)
        limit = self._factor * self._mean
        is_spike = (self._seen >= self._warmup) & ~(norms <= limit)  # also if it is NaN
        size = torch.where(is_spike, norms / self._mean, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        self._when = torch.where(size > self._largest, update_counter.update + 1, self._when)
        self._largest = torch.maximum(self._largest, size)
        self._count = self._count + is_spike.any()
        usual = torch.where(is_spike, limit, torch.where(norms.isfinite(), norms, self._mean))
        has_gradient = norms != 0
        self._seen = self._seen + has_gradient
        weight = torch.where(has_gradient, (1.0 / self._seen).clamp(min=1 - self._decay), 0.0)
        self._mean = torch.lerp(self._mean, usual, weight)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.writer.add_scalar("gradient_spikes", self._count)
        for module, size, update in zip(self.norms.groups, self._largest.tolist(), self._when.tolist(), strict=True):
            if size:
                self.writer.add_scalar(f"gradient_spikes/{module}", size)
                self.logger.warning(
                    "update %d: the gradient norm of '%s' is %.3g times its running mean", update, module, size
                )
        self._start_interval()

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, and what was found since the last log."""
        held = {name: getattr(self, f"_{name}") for name in ("mean", "seen", "largest", "when", "count")}
        return {"modules": list(self.norms.groups), **held}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them; for other modules it starts anew."""
        if state_dict["modules"] == list(self.norms.groups):
            for name in ("mean", "seen", "largest", "when", "count"):
                setattr(self, f"_{name}", to_device(state_dict[name], self.trainer.device))
