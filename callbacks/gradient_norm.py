"""Norm of the gradients."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback


class GradientNorm(PeriodicCallback):
    """Logs ``gradient_norm``, that of the last update before clipping; a run without clipping logs nothing."""

    logs: ClassVar[Sequence[str] | None] = ("gradient_norm",)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if self.trainer.grad_norm is not None:
            self.writer.add_scalar("gradient_norm", self.trainer.grad_norm)
