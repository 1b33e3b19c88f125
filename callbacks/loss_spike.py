"""What a spike of the training loss does."""

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import Any, ClassVar, Literal

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.types import NonNegativeInt, PositiveFloat, TwoOrMore, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import LossError
from ksuit_runner.keyed_random import uses_no_rng


class LossSpike(PeriodicCallback):
    """Skips updates whose loss is far above what it has been, or ends the run.

    A spike is a loss that exceeds the mean of the losses before it by ``threshold`` of their standard deviations. Mean
    and deviation are exponential, over about the last ``window`` losses that were no spikes; before there are so many,
    no loss is a spike. ``NAME/skipped`` is how many updates were skipped so far. Losses that are not finite are left to
    ``trainer.nan_loss``.

    A skipped update counts, and changes neither weights nor buffers nor the state of the optimizer. The loss of every
    update is read before its step, which waits for the device.

    Source: Chowdhery et al., PaLM, 2022, section 5.1, https://arxiv.org/abs/2204.02311, which skips the batches of
    spikes by hand; detection by z-scores as in Kumar et al., ZClip, 2025, https://arxiv.org/abs/2504.02507.

    Args:
        threshold: Number of standard deviations.
        window: Number of updates that mean and standard deviation are over.
        action: ``skip`` skips the update, ``fail`` ends the run with the state before it.
        max_skips: Largest number of updates in a row that are skipped; one more ends the run.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A number is out of its range.
    """

    logs: ClassVar[Sequence[str] | None] = ("{name}/skipped",)
    replaces_state: ClassVar[bool] = True

    def __init__(
        self,
        threshold: PositiveFloat = 6.0,
        window: TwoOrMore = 100,
        action: Literal["skip", "fail"] = "skip",
        max_skips: NonNegativeInt = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveFloat", threshold=threshold)
        check_numbers("TwoOrMore", window=window)
        check_numbers("NonNegativeInt", max_skips=max_skips)
        self.threshold, self.window, self.action, self.max_skips = threshold, window, action, max_skips
        self.trainer.keep_total_loss()
        self._state = {"losses": 0, "mean": 0.0, "variance": 0.0, "in_a_row": 0, "skipped": 0}

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        loss, state = self.trainer.total_loss.item(), self._state
        deviation = sqrt(max(0.0, state["variance"]))  # which rounding may take below 0
        is_spike = state["losses"] >= self.window and loss > state["mean"] + self.threshold * deviation
        if not is_spike:
            self._follow(loss)
            state["in_a_row"] = 0
            return
        usual = f"{state['mean']:.4g} ± {deviation:.2g}"
        what = f"the loss of update {update_counter.update + 1} is {loss:.4g}, and was {usual} before"
        if self.action == "fail":
            raise LossError(what, path=f"callbacks.{self.display_name}")
        if state["in_a_row"] >= self.max_skips:
            before = f", and the {self.max_skips} before it were skipped" if self.max_skips else ""
            raise LossError(f"{what}{before}", path=f"callbacks.{self.display_name}.max_skips")
        self.logger.warning("%s; it is skipped", what)
        state["in_a_row"] += 1
        state["skipped"] += 1
        self.trainer.skip_update()

    def _follow(self, loss: float) -> None:
        """Let mean and variance follow; those of the first ``window`` losses are not weighted."""
        if not isfinite(loss):
            return
        state = self._state
        state["losses"] = min(state["losses"] + 1, self.window)
        difference = loss - state["mean"]
        state["mean"] += difference / state["losses"]
        state["variance"] += (difference * (loss - state["mean"]) - state["variance"]) / state["losses"]

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.writer.add_scalar(f"{self.display_name}/skipped", self._state["skipped"])

    def state_dict(self) -> dict[str, Any]:
        """Return mean and variance of the losses, and how many updates were skipped, in a row and in all."""
        return dict(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._state = {name: state_dict[name] for name in self._state}
