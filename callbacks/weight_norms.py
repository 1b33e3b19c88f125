"""Norms of the weights of modules."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.module_norms import ModuleNorms


class WeightNorms(PeriodicCallback):
    """Logs ``weight_norms/MODULE``, the Euclidean norm of the parameters of a module, and ``weight_norms``, of all.

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None goes by depth.
        depth: How many parts of a parameter's name say which module it belongs to: 2 are ``blocks.0``. None takes the
            module that has it.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A pattern matches no module with parameters, or the depth is no positive whole number.
    """

    logs: ClassVar[Sequence[str] | None] = ("weight_norms", "weight_norms/*")

    def __init__(self, match: Sequence[str] | None = None, depth: int | None = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._norms = ModuleNorms(self.trainer, match, depth, f"callbacks.{self.display_name}")

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for module, norm in self._norms.of(lambda parameter: parameter).items():
            self.writer.add_scalar(f"weight_norms/{module}".rstrip("/"), norm)
