"""Training loss."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback
from ksuit_runner.trainer.losses import Losses, add_losses, mean_losses
from ksuit_runner.trainer.sums import PartSums, Sums


class TrainLoss(PeriodicCallback):
    """Logs ``loss/train``, the mean over the samples since it was last logged, or over what the loss counts.

    Other losses that the trainer's ``training_step`` names are logged as ``loss_NAME/train``. The sums stay on the
    device: nothing waits for it between two logs.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("loss/train", "loss_*/train")
    is_repeatable: ClassVar[bool] = False
    merges_states: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums = PartSums(Sums, self.data_container.world, self.trainer.device)

    @uses_no_rng
    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Losses, outputs: Any
    ) -> None:
        weight = self.trainer.part_weight(batch)
        add_losses(self._sums[update_counter.accumulation_step], losses, weight, weight, self.trainer.sums_up)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for (name,), value in mean_losses(self._sums.take().totals, self.trainer.loss_weights).items():
            self.writer.add_scalar("loss/train" if name == "total" else f"loss_{name}/train", value)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log."""
        return self._sums.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums since the last log."""
        self._sums.load_state_dict(_in_parts(state_dict), self.trainer.accumulation_steps)

    def merge_state_dicts(self, state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the sums of the parts of all ranks."""
        return PartSums.merged(state_dicts)


def _in_parts(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state as it is now, from one that was stored when all parts were summed up together."""
    if "parts" in state:
        return state
    counts = state.get("counts", dict.fromkeys(state["sums"], state.get("count")))  # once all losses had the same
    return {"parts": {"0": {(name,): [value, counts[name]] for name, value in state["sums"].items()}}}
