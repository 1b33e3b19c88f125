"""Norms of what an update changes the weights of modules by."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import local, spread
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.module_norms import ModuleNorms
from ksuit_runner.trainer.sums import to_device


class UpdateNorms(PeriodicCallback):
    """Logs ``update_norms/MODULE``, the Euclidean norm of what the last update has changed a module's parameters by.

    Also ``update_ratios/MODULE``, that norm divided by the norm of the parameters themselves, after the update: often
    about 0.001 where training goes well. ``update_norms`` and ``update_ratios`` are those of all modules together.

    It copies the parameters before an update after which it acts, and holds the copy until then. Frozen parameters do
    not count.

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None goes by depth.
        depth: How many parts of a parameter's name say which module it belongs to: 2 are ``blocks.0``. None takes the
            module that has it.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A pattern matches no module with parameters, or the depth is no positive whole number.
    """

    logs: ClassVar[Sequence[str] | None] = ("update_norms", "update_norms/*", "update_ratios", "update_ratios/*")

    def __init__(self, match: Sequence[str] | None = None, depth: int | None = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._norms = ModuleNorms(self.trainer, match, depth, f"callbacks.{self.display_name}")
        self._parameters = list(chain(*self._norms.groups.values()))
        self._before: dict[nn.Parameter, Tensor] = {}

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            self._before = {item: local(item).detach().clone() for item in self._parameters if item.requires_grad}

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        before, self._before = self._before, {}
        changes = self._norms.of(lambda item: spread(local(item) - before[item], item) if item in before else None)
        weights = self._norms.of(lambda item: item if item in before else None)
        for module, norm in changes.items():
            self.writer.add_scalar(f"update_norms/{module}".rstrip("/"), norm)
            self.writer.add_scalar(f"update_ratios/{module}".rstrip("/"), norm / weights[module])

    def state_dict(self) -> dict[str, Any]:
        """Return the copies, if an update is done and not looked at yet."""
        return {str(i): self._before[item] for i, item in enumerate(self._parameters) if item in self._before}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._before = {
            self._parameters[int(i)]: to_device(item, self.trainer.device) for i, item in state_dict.items()
        }
