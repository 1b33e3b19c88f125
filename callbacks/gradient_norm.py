"""Norm of the gradients."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class GradientNorm(PeriodicCallback):
    """Logs ``gradient_norm``, that of the last update before clipping; a run without clipping logs nothing.

    An optimizer with a ``clip_norm`` of its own logs ``gradient_norm/NAME``.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_norm", "gradient_norm/*")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_idle = type(self) is GradientNorm and not self.trainer.optimizer_step.is_clipped

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if self.trainer.grad_norm is not None:
            self.writer.add_scalar("gradient_norm", self.trainer.grad_norm)
        for name, member in self.trainer.optimizers.members.items():
            if member.grad_norm is not None:
                self.writer.add_scalar(f"gradient_norm/{name}", member.grad_norm)
