"""Parameters that the loss does not depend on."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.parameter_rules import named_parameters

_MOST_NAMES = 20


class UnusedParameters(PeriodicCallback):
    """Warns of trainable parameters that have had no gradient in any update so far, by name.

    They are not trained, because a layer is not called, an output is in no loss, or there is a ``detach`` too many.
    Their number is logged as ``unused_parameters``; their names are shown whenever they change. Frozen parameters do
    not count, and a gradient of zeros is a gradient. Once all have had one, the callback looks no more.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("unused_parameters",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._unused = named_parameters(self.trainer.model.module, self.trainer.loss)
        self._shown: list[str] = []

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self._unused:
            self._unused = {name: item for name, item in self._unused.items() if item.grad is None}

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if update_counter.update == 0:  # nothing has been trained yet
            return
        names = [name for name, item in self._unused.items() if item.requires_grad]
        self.writer.add_scalar("unused_parameters", len(names))
        if names and names != self._shown:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            self.logger.warning("no gradient so far, so not trained: %s%s", ", ".join(names[:_MOST_NAMES]), more)
        self._shown = names

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the parameters without a gradient so far, and of those that were shown."""
        return {"unused": list(self._unused), "shown": self._shown}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        unused = set(state_dict["unused"])
        self._unused = {name: item for name, item in self._unused.items() if name in unused}
        self._shown = list(state_dict["shown"])
