"""Exponential moving averages of the weights."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.averaging import AveragingCallback
from ksuit_runner.config.types import OpenFraction, check_numbers
from ksuit_runner.errors import ConfigError


class Ema(AveragingCallback):
    """Maintains averages of the weights, one per decay, and offers them for evaluation beside the live ones.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; the warm-up of the decay,
    min(decay, (1 + n) / (10 + n)) when the average moves for the n-th time, is that of TensorFlow's
    ExponentialMovingAverage.

    Args:
        decays: Decay of each average, between 0 and 1: the share of the previous average whenever it moves. Metrics of
            a single one end in ``/NAME``, those of several in ``/NAME_DECAY``, where NAME is the name of the callback.
        warmup: Start with smaller decays, so that the average soon forgets the random weights it started from.
        **kwargs: Passed on to AveragingCallback: what is averaged, from when on, and how often.

    Raises:
        ConfigError: There is no decay, one twice, or one that is not between 0 and 1.
    """

    offers: ClassVar[Sequence[str] | None] = ("{name}{_decays+}",)

    def __init__(self, decays: Sequence[OpenFraction] = (0.99,), warmup: bool = True, **kwargs: Any) -> None:
        check_numbers("OpenFraction", decays=decays)
        if not decays or len(set(decays)) < len(decays):
            raise ConfigError(f"decays: different numbers are needed, one at least, not {list(decays)}")
        self._decays, self.warmup = list(decays), warmup
        super().__init__(**kwargs)
        self.decays = dict(zip(self.models, decays, strict=True))

    def _labels(self) -> list[str]:
        name = self.display_name
        return [name] if len(self._decays) == 1 else [f"{name}_{decay}" for decay in self._decays]

    def _share(self, label: str) -> float:
        decay = self.decays[label]
        return 1 - (min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay)
