"""Norms of the gradients of modules."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.norms import NormsCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.module_norms import gradient
from ksuit_runner.trainer.sums import to_device


class GradientNorms(NormsCallback):
    """Logs ``gradient_norms/MODULE``, the Euclidean norm of the gradients of a module, and ``gradient_norms``, of all.

    The gradients are those of the update after which the callback acts, before clipping; other updates are not looked
    at. A module without a gradient, such as a frozen one, is left out.

    Args:
        **kwargs: Passed on to NormsCallback: which modules.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_norms", "gradient_norms/*")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._found: dict[str, Tensor] = {}

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            self._found = self.norms.of(gradient)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.log_norms("gradient_norms", self._found)
        self._found = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that are still to be logged."""
        return dict(self._found)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._found = {module: to_device(norm, self.trainer.device) for module, norm in state_dict.items()}
