"""Base class of callbacks that look at norms of modules."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.trainer.module_norms import ModuleNorms


class NormsCallback(PeriodicCallback):
    """A periodic callback that computes norms module by module, with ``self.norms``.

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None goes by depth.
        depth: How many parts of a parameter's name say which module it belongs to: with 2, ``blocks.0.norm.weight``
            belongs to ``blocks.0``. None takes the module that has the parameter itself.
        **kwargs: Passed on to PeriodicCallback.

    Attributes:
        norms: Computes norms of the chosen modules.

    Raises:
        ConfigError: A pattern matches no module with parameters, or the depth is no positive whole number.
    """

    def __init__(self, match: Sequence[str] | None = None, depth: PositiveInt | None = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norms = ModuleNorms(self.trainer, match, depth, f"callbacks.{self.display_name}")

    def log_norms(self, metric: str, norms: Mapping[str, Tensor]) -> None:
        """Log norms by module as ``METRIC/MODULE``, and that of all together, which has no name, as ``METRIC``."""
        for module, norm in norms.items():
            self.writer.add_scalar(f"{metric}/{module}" if module else metric, norm)
