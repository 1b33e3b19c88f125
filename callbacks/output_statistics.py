"""Statistics of a model's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_bases.online import OnlineCallback
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.tensors.name_patterns import matches_any, matching
from ksuit_runner.tensors.nested import named_tensors
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.moments import STATISTICS, Moments


class OutputStatistics(OnlineCallback[Moments]):
    """Logs mean, standard deviation and largest absolute value of the outputs since they were last logged.

    They are logged as ``outputs/NAME/mean``, ``outputs/NAME/std`` and ``outputs/NAME/abs_max``, and with ``per_epoch``
    those of each epoch as ``outputs/NAME/mean/epoch`` and so on. The name of an output is its path in what
    ``training_step`` returns, such as ``latent/mean`` or ``hidden/0``; a single tensor is called ``output``. The sums
    stay on the device: nothing waits for it between two logs.

    Args:
        match: Patterns of names.
        statistics: Which of ``mean``, ``std`` and ``abs_max`` are logged.
        **kwargs: Passed on to OnlineCallback.

    Raises:
        ConfigError: There is no such statistic; or a pattern matches nothing, which is raised at the first update.
    """

    logs: ClassVar[Sequence[str] | None] = ("outputs/*",)

    def __init__(
        self, match: list[str] | None = None, statistics: Sequence[str] = ("mean", "std", "abs_max"), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name in statistics:
            if name not in STATISTICS:
                raise ConfigError(f"statistics: there is no '{name}'. {did_you_mean(name, STATISTICS)}")
        self._match = match or ["*"]
        self._logged = list(statistics)
        self._has_checked = False

    def _new_sums(self) -> Moments:
        return Moments()

    def _accumulate(self, sums: Moments, batch: Any, losses: Losses, outputs: Any) -> None:
        named = named_tensors(outputs) if not isinstance(outputs, Tensor) else [("output", outputs)]
        found = {name: output for name, output in named if not output.is_complex()}
        if not self._has_checked:
            self._check(found)
        for name, output in found.items():
            if output.numel() and matches_any(name, self._match):
                sums.add(name, output)

    def _log(self, sums: Moments, suffix: str) -> None:
        for name, moments in sums.held.items():
            for kind in self._logged:
                self.writer.add_scalar(f"outputs/{name}/{kind}{suffix}", STATISTICS[kind](*moments))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums since the last log."""
        is_in_parts = isinstance(state_dict.get("parts"), Mapping)  # earlier versions added up all parts together
        super().load_state_dict(state_dict if is_in_parts else {"parts": {"0": state_dict}})

    def _check(self, found: Mapping[str, Tensor]) -> None:
        self._has_checked = True
        for pattern in self._match:
            if not matching(pattern, found):
                names = f"There are: {', '.join(found)}" if found else "training_step returns no tensors as outputs"
                raise ConfigError(
                    f"'{pattern}' matches no output. {did_you_mean(pattern, found)}\n{names}",
                    path=f"callbacks.{self.name}.match",
                )
