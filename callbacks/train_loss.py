"""Training loss."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback
from ksuit_runner.trainer.losses import Losses, LossMeans


class TrainLoss(PeriodicCallback):
    """Logs ``loss/train``, the mean over the samples since it was last logged, or over what the loss counts.

    Other losses that the trainer's ``training_step`` names are logged as ``loss_NAME/train``. The sums stay on the
    device: nothing waits for it between two logs.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("loss/train", "loss_*/train")
    is_repeatable: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._means = LossMeans(self.trainer.sums_up)

    @uses_no_rng
    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Losses, outputs: Any
    ) -> None:
        weight = self.trainer.part_weight(batch)
        self._means.add(losses, weight, weight)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for name, value in self._means.means().items():
            self.writer.add_scalar("loss/train" if name == "total" else f"loss_{name}/train", value)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log."""
        return self._means.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums since the last log."""
        if "count" in state_dict:  # stored when all losses had the same
            counts = dict.fromkeys(state_dict["sums"], state_dict["count"])
            state_dict = {"sums": state_dict["sums"], "counts": counts, "factors": {}}
        self._means.load_state_dict(state_dict, self.trainer.device)
