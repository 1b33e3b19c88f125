"""Learning rates of the parameter groups."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback


class LearningRate(PeriodicCallback):
    """Logs ``learning_rate``, that of the next update; ``learning_rate/GROUP`` where parameter groups differ.

    Of several optimizers it logs ``learning_rate/NAME``, or ``learning_rate/NAME/GROUP`` where its groups differ.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("learning_rate", "learning_rate/*")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Decided once: groups that differ may coincide later, such as at 0 when a schedule ends.
        rates = self.trainer.learning_rates()
        of_optimizer: dict[str, set[float]] = {}
        for name, rate in rates.items():
            of_optimizer.setdefault(name.rpartition("/")[0], set()).add(rate)
        self._keys = {}
        for name in rates:
            optimizer = name.rpartition("/")[0]
            is_shared = len(of_optimizer[optimizer]) == 1
            self._keys[f"learning_rate/{optimizer if is_shared else name}".rstrip("/")] = name

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        rates = self.trainer.learning_rates()
        for key, name in self._keys.items():
            self.writer.add_scalar(key, rates[name])
