"""Training loss."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback


class TrainLoss(PeriodicCallback):
    """Logs ``loss/train``, the mean over the samples since it was last logged.

    Other losses that the trainer's ``training_step`` names are logged as ``loss_NAME/train``. The sums stay on the
    device: nothing waits for it between two logs.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("loss/train", "loss_*/train")
    is_repeatable: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: dict[str, Tensor] = {}
        self._count = 0.0

    @uses_no_rng
    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Mapping[str, Tensor], outputs: Any
    ) -> None:
        weight = self.trainer.part_weight(batch)
        self._count += weight
        for name, loss in losses.items():
            factor = 1 if name == "total" and self.trainer.sums_up else weight
            if name in self._sums:
                self._sums[name].add_(loss, alpha=factor)
            else:
                self._sums[name] = loss.float() * factor

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for name, value in self._sums.items():
            self.writer.add_scalar("loss/train" if name == "total" else f"loss_{name}/train", value / self._count)
        self._sums, self._count = {}, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums since the last log."""
        self._sums = {name: value.to(self.trainer.device, copy=True) for name, value in state_dict["sums"].items()}
        self._count = state_dict["count"]
