"""Norms of the weights of modules."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_bases.norms import NormsCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class WeightNorms(NormsCallback):
    """Logs ``weight_norms/MODULE``, the Euclidean norm of the parameters of a module, and ``weight_norms``, of all.

    Args:
        **kwargs: Passed on to NormsCallback: which modules.
    """

    logs: ClassVar[Sequence[str] | None] = ("weight_norms", "weight_norms/*")

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.log_norms("weight_norms", self.norms.of(lambda parameter: parameter))
