"""Norms of the gradients of modules."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.module_norms import ModuleNorms, gradient
from ksuit_runner.trainer.sums import to_device


class GradientNorms(PeriodicCallback):
    """Logs ``gradient_norms/MODULE``, the Euclidean norm of the gradients of a module, and ``gradient_norms``, of all.

    They are those of the update after which it acts, before clipping. Other updates are not looked at. A module without
    a gradient, such as a frozen one, is left out.

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None goes by depth.
        depth: How many parts of a parameter's name say which module it belongs to: 2 are ``blocks.0``. None takes the
            module that has it.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A pattern matches no module with parameters, or the depth is no positive whole number.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_norms", "gradient_norms/*")

    def __init__(self, match: Sequence[str] | None = None, depth: int | None = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._norms = ModuleNorms(self.trainer, match, depth, f"callbacks.{self.display_name}")
        self._found: dict[str, Tensor] = {}

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            self._found = self._norms.of(gradient)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for module, norm in self._found.items():
            self.writer.add_scalar(f"gradient_norms/{module}".rstrip("/"), norm)
        self._found = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that are still to be logged."""
        return dict(self._found)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._found = {module: to_device(norm, self.trainer.device) for module, norm in state_dict.items()}
