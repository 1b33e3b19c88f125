"""Learning rates and weight decays of the parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class LearningRate(PeriodicCallback):
    """Logs ``learning_rate`` as the update has used it; ``learning_rate/GROUP`` where parameter groups differ.

    With several optimizers it logs ``learning_rate/NAME``, or ``learning_rate/NAME/GROUP`` for one whose groups differ.
    ``weight_decay`` is logged in the same way, if it has a schedule or the argument asks for it.

    Args:
        weight_decay: Whether the weight decay is logged; None logs it where it has a schedule.
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("learning_rate", "learning_rate/*", "weight_decay", "weight_decay/*")

    def __init__(self, weight_decay: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        optimizers = self.trainer.optimizers
        if weight_decay is None:
            weight_decay = any("weight_decay_schedule" in member.schedules for member in optimizers.members.values())
        options = {"lr": "learning_rate", **({"weight_decay": "weight_decay"} if weight_decay else {})}
        # Decided once: groups that differ may coincide later, such as at 0 when a schedule ends.
        self._keys = {option: _keys(metric, optimizers.options(option)) for option, metric in options.items()}

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for option, keys in self._keys.items():
            values = self.trainer.optimizers.used_options(option)
            for key, name in keys.items():
                self.writer.add_scalar(key, values[name])


def _keys(metric: str, values: Mapping[str, float]) -> dict[str, str]:
    """Return the keys to log, each with the name of a group: one key for all groups of an optimizer that agree."""
    of_optimizer: dict[str, set[float]] = {}
    for name, value in values.items():
        of_optimizer.setdefault(name.rpartition("/")[0], set()).add(value)
    keys = {}
    for name in values:
        optimizer = name.rpartition("/")[0]
        label = optimizer if len(of_optimizer[optimizer]) == 1 else name
        keys[f"{metric}/{label}".rstrip("/")] = name
    return keys
