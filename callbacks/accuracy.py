"""How often the right class is among the first k."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.periodic_callback import DatasetCallback


class Accuracy(DatasetCallback):
    """Logs ``accuracy/DATASET``, and ``accuracy_topK/DATASET`` for K > 1, for the live and all other weights.

    Outputs are scores of shape (batch, ..., classes), targets the classes, of shape (batch, ...).

    Args:
        topk: Numbers of first classes among which the right one counts.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: A k is smaller than 1.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "accuracy/{dataset_key}",
        "accuracy/{dataset_key}/*",
        "accuracy_top*/{dataset_key}",
        "accuracy_top*/{dataset_key}/*",
    )

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not topk or min(topk) < 1:
            raise ConfigError(f"topk: numbers of at least 1 are needed, not {list(topk)}")
        self.topk = sorted(set(topk))
        self._hits: dict[str, Tensor] = {}
        self._count = 0

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = batch
        for weights, model in models.items():
            hits = self._count_hits(self.trainer.predict(inputs, model), targets)
            self._hits[weights] = self._hits[weights] + hits if weights in self._hits else hits
        self._count += targets.numel()

    def _count_hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the number of hits for each k, on the device."""
        largest, classes = self.topk[-1], outputs.shape[-1]
        if largest > classes:
            raise ConfigError(f"callbacks.{self.name}.topk: {largest} is more than the {classes} classes")
        hits = outputs.topk(largest, dim=-1).indices == targets.unsqueeze(-1)
        counts = hits.flatten(0, -2).sum(0).cumsum(0)
        return counts[torch.tensor(self.topk, device=counts.device) - 1]

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, hits in self._hits.items():
            for k, value in zip(self.topk, hits.double() / self._count, strict=True):
                metric = "accuracy" if k == 1 else f"accuracy_top{k}"
                self.writer.add_scalar(self.metric_key(metric, weights), value)
        self._hits, self._count = {}, 0
