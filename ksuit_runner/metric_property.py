"""The better direction of a metric, by the pattern of its key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.name_patterns import matches_any

Direction = Literal["higher", "lower", "neutral"]
HIGHER: Final = (
    *("*accuracy*", "*precision*", "*recall*", "*auroc*", "*r2_score*"),
    *("f1*", "*[/_]f1*", "iou*", "*[/_]iou*"),  # as a word: bf16 has an f1 in it, and previous an iou
)
LOWER: Final = ("*loss*", "*error*", "*perplexity*", "*bits_per_*")


class MetricPropertyProvider:
    """Knows whether higher or lower values of a metric are better.

    Patterns ignore case.

    Args:
        higher: Patterns (``*`` matches anything, ``[/_]`` one of these) of keys where higher is better.
        lower: Patterns of keys where lower is better.
        neutral: Patterns of keys where neither is; they take precedence.
    """

    def __init__(
        self,
        higher: Sequence[str] = HIGHER,
        lower: Sequence[str] = LOWER,
        neutral: Sequence[str] = ("*lossdiff*", "*loss_diff*", "*loss_weight*", "*loss_scale*", "time/*", "system/*"),
    ) -> None:
        given: dict[Direction, Sequence[str]] = {"neutral": neutral, "higher": higher, "lower": lower}
        self._patterns = {direction: [text.lower() for text in texts] for direction, texts in given.items()}
        self._known: dict[str, Direction] = {}

    def direction(self, key: str) -> Direction:
        """Return which direction is better for this key; ``neutral`` for a key that no pattern matches."""
        known = self._known.get(key)
        if known is None:  # worked out once: this is asked for every point
            known = self._known[key] = self._match(key)
        return known

    def _match(self, key: str) -> Direction:
        for direction, patterns in self._patterns.items():
            if matches_any(key.lower(), patterns):
                return direction
        return "neutral"

    def higher_is_better(self, key: str) -> bool:
        """Whether higher values of a metric are better, and not lower ones.

        Raises:
            ConfigError: Neither are.
        """
        direction = self.direction(key)
        if direction == "neutral":
            raise ConfigError(f"neither higher nor lower values of '{key}' are better", path="metric_property_provider")
        return direction == "higher"

    def is_better(self, key: str, value: float, than: float | None) -> bool:
        """Whether a value improves on another one; neutral metrics improve with every new value, NaN never does."""
        return improves(self.direction(key), value, than)


def improves(direction: Direction, value: float, than: float | None) -> bool:
    """Whether a value improves on another one, in a direction."""
    if value != value:
        return False
    if than is None or than != than or direction == "neutral":
        return True
    return value > than if direction == "higher" else value < than


@dataclass
class Summary:
    """Last and best value of a metric, each with its update; neutral metrics have no best."""

    direction: Direction
    last: float
    last_step: int
    best: float | None = None
    best_step: int | None = None

    def add(self, value: float, step: int) -> None:
        """Add a value that was logged at an update."""
        self.last, self.last_step = value, step
        if self.direction != "neutral" and improves(self.direction, value, self.best):
            self.best, self.best_step = value, step
