"""Top-k accuracy on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.periodic_callback import DatasetCallback
from ksuit_runner.trainer.hits import checked_topk, count_hits


class Accuracy(DatasetCallback):
    """Logs ``accuracy/DATASET``, and ``accuracy_topK/DATASET`` for K > 1, for the live and all other weights.

    Outputs are scores of shape (batch, ..., classes), targets are class indices of shape (batch, ...).

    Args:
        topk: Values of k: a prediction is right if the target is among the k classes with the highest scores.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: A k is smaller than 1; or, at the first evaluation, larger than the number of classes, or the
            targets are not class indices.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "accuracy/{dataset_key}",
        "accuracy/{dataset_key}/*",
        "accuracy_top{topk}/{dataset_key}",
        "accuracy_top{topk}/{dataset_key}/*",
    )

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = checked_topk(topk)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            outputs = self.trainer.predict(inputs, model)
            hits = count_hits(outputs, targets, self.topk[-1], f"callbacks.{self.display_name}")
            self.gathered.add(weights, hits, count=targets.numel())

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, hits in self.gathered.totals.items():
            for k in self.topk:
                metric = "accuracy" if k == 1 else f"accuracy_top{k}"
                value = hits.sum[:k].sum().to(self.sum_dtype) / hits.count
                self.writer.add_scalar(self.metric_key(metric, weights), value)
