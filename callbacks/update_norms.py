"""Norms of what an update changes the weights of modules by."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.norms import NormsCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import local, spread
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.sums import to_device


class UpdateNorms(NormsCallback):
    """Logs ``update_norms/MODULE``, the Euclidean norm of the last update's change of a module's parameters.

    It also logs ``update_ratios/MODULE``, that norm divided by the norm of the parameters after the update: often about
    0.001 where training goes well. ``update_norms`` and ``update_ratios`` are those of all modules together.

    Before an update after which it acts it copies the parameters, and holds the copy until it has logged. Frozen
    parameters do not count.

    Args:
        **kwargs: Passed on to NormsCallback: which modules.
    """

    logs: ClassVar[Sequence[str] | None] = ("update_norms", "update_norms/*", "update_ratios", "update_ratios/*")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._parameters = list(chain(*self.norms.groups.values()))
        self._before: dict[nn.Parameter, Tensor] = {}

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            self._before = {item: local(item).detach().clone() for item in self._parameters if item.requires_grad}

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        before, self._before = self._before, {}
        changes = self.norms.of(lambda item: spread(local(item) - before[item], item) if item in before else None)
        weights = self.norms.of(lambda item: item if item in before else None)
        self.log_norms("update_norms", changes)
        self.log_norms("update_ratios", {module: norm / weights[module] for module, norm in changes.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the copies, if an update is done and not looked at yet."""
        return {str(i): self._before[item] for i, item in enumerate(self._parameters) if item in self._before}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._before = {
            self._parameters[int(i)]: to_device(item, self.trainer.device) for i, item in state_dict.items()
        }
