"""Training loss."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.online import RunningCallback
from ksuit_runner.trainer.losses import mean_losses
from ksuit_runner.trainer.sums import Sums


class TrainLoss(RunningCallback[Sums]):
    """Logs ``loss/train``, the mean over the samples since it was last logged, or over what the loss counts.

    Other losses that the trainer's ``training_step`` names are logged as ``loss_NAME/train``; with ``per_epoch`` the
    means over each epoch as ``loss/train/epoch``. On an accelerator the sums stay there: nothing waits for it.

    Args:
        **kwargs: Passed on to RunningCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("loss/train", "loss_*/train", "loss/train/epoch", "loss_*/train/epoch")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for sums in self.running:
            self.trainer.running_losses.add_to(sums)

    def _new_sums(self) -> Sums:
        return Sums()

    def _log(self, sums: Sums, suffix: str) -> None:
        for (name,), value in mean_losses(sums.totals, self.trainer.loss_weights).items():
            self.writer.add_scalar(("loss/train" if name == "total" else f"loss_{name}/train") + suffix, value)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums since the last log."""
        super().load_state_dict(_in_parts(state_dict))


def _in_parts(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state as it is now, from one that was stored when all parts were summed up together."""
    if "parts" in state:
        return state
    counts = state.get("counts", dict.fromkeys(state["sums"], state.get("count")))  # one for all losses, before that
    return {"parts": {"0": {(name,): [value, counts[name]] for name, value in state["sums"].items()}}}
