"""How often the right class is among those with the highest scores."""

from collections.abc import Sequence

from torch import Tensor

from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.heads import classes_last


def count_hits(scores: Tensor, targets: Tensor, most: int, path: str, counted: Tensor | None = None) -> Tensor:
    """Return how often the target has the i-th highest score, as a tensor of shape (most,) on the device.

    Args:
        scores: Scores of shape (samples, ..., classes) or (samples, classes, ...).
        targets: Class indices of shape (samples, ...).
        most: Number of the highest scores to look at.
        path: Config path of the callback, for messages.
        counted: Which targets count, truth values of the same shape; None for all.

    Raises:
        ConfigError: The targets are not class indices, or there are fewer classes.
    """
    scores = classes_last(scores, targets, path)
    if most > scores.shape[-1]:
        raise ConfigError(f"{most} is more than the {scores.shape[-1]} classes", path=f"{path}.topk")
    hits = scores.topk(most, dim=-1).indices == targets.unsqueeze(-1)
    if counted is not None:
        hits &= counted.unsqueeze(-1)
    return hits.flatten(0, -2).sum(0)


def checked_topk(topk: Sequence[int]) -> list[int]:
    """Return the values of k, ascending.

    Raises:
        ConfigError: There is none, or one below 1.
    """
    if not topk or min(topk) < 1:
        raise ConfigError(f"topk: numbers of at least 1 are needed, not {list(topk)}")
    return sorted(set(topk))
