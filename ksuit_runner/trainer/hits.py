"""How often the right class is among those with the highest scores."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.heads import Head
from ksuit_runner.trainer.sums import Total


class TopkAccuracy:
    """Accuracies of the heads of a model for several k, from counts that add up.

    Args:
        topk: Values of k: a prediction is right if the target is among the k classes with the highest scores.
        heads: What a config says of each head, by name, see ``Head``; None takes outputs and targets as they are.
        ignore_index: Target that does not count, such as -100; None counts all.
        path: Config path of the callback, for messages.

    Attributes:
        topk: The values of k, ascending.
        heads: The heads by name; a single one may have the empty name.

    Raises:
        ConfigError: A k is smaller than 1, or a head is wrong.
    """

    def __init__(
        self,
        topk: Sequence[PositiveInt],
        heads: Mapping[str, Mapping[str, Any]] | None,
        ignore_index: int | None,
        path: str,
    ) -> None:
        check_numbers("PositiveInt", topk=topk)
        if not topk:
            raise ConfigError("topk: one number or more is needed")
        self.topk = sorted(set(topk))
        named = {
            name: Head.from_config(f"{path}.heads.{name}", {"ignore_index": ignore_index, **given})
            for name, given in (heads or {}).items()
        }
        self.heads = named or {"": Head(ignore_index=ignore_index, path=path)}
        self._path = path

    def hits(self, outputs: Any, targets: Any) -> Iterator[tuple[str, Tensor, int | Tensor]]:
        """Yield the name of each head, how often the target has the i-th highest score, and how many targets count.

        The hits are a tensor of shape (largest k,), on the device.

        Raises:
            ConfigError: A head is not there, the targets are not class indices, or there are fewer classes than a k.
        """
        for name, head in self.heads.items():
            scores, classes, counted = head.scores(outputs, targets)
            most = self.topk[-1]
            if most > scores.shape[-1]:
                raise ConfigError(f"{most} is more than the {scores.shape[-1]} classes", path=f"{self._path}.topk")
            hits = _places(scores, classes, most)
            if counted is not None:
                hits &= counted.unsqueeze(-1)
            yield name, hits.flatten(0, -2).sum(0), classes.numel() if counted is None else counted.sum()

    def accuracies(self, name: str, hits: Total) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each metric of a head, as ``accuracy_top5_digit``, and its value; NaN over no targets."""
        for k in self.topk:
            metric = "accuracy" if k == 1 else f"accuracy_top{k}"
            yield f"{metric}_{name}" if name else metric, hits.sum[:k].sum().to(hits.dtype) / hits.count


def _places(scores: Tensor, classes: Tensor, most: int) -> Tensor:
    """Return whether targets have the i-th highest score, of shape (..., most); of equal scores the first counts more.

    This agrees with ``argmax``, which other code counts by. ``topk`` returns equal scores, which are frequent in half
    precision, in any order.
    """
    hits = [scores.argmax(-1) == classes]
    if most > 1:
        own = classes.clamp(0, scores.shape[-1] - 1)  # what is no class hits nothing
        score = scores.gather(-1, own.unsqueeze(-1))
        is_earlier = torch.arange(scores.shape[-1], device=scores.device) < own.unsqueeze(-1)
        place = (~(scores <= score) | ((scores == score) & is_earlier)).sum(-1)
        hits += [(place == number) & (own == classes) for number in range(1, most)]
    return torch.stack(hits, -1) if most > 1 else hits[0].unsqueeze(-1)
