"""Top-k accuracy on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.trainer.hits import TopkAccuracy


class Accuracy(DatasetCallback):
    """Logs ``accuracy/DATASET``, and ``accuracy_topK/DATASET`` for K > 1, for the live and all other weights.

    Outputs are scores of shape (batch, ..., classes) or (batch, classes, ...), targets are class indices of shape
    (batch, ...). With ``heads`` it logs ``accuracy_HEAD/DATASET`` and ``accuracy_topK_HEAD/DATASET`` instead; over no
    samples they are NaN.

    Args:
        topk: Values of k: a prediction is right if the target is among the k classes with the highest scores.
        heads: Heads by name, each with any of ``outputs``, ``targets``, ``classes``, ``restrict_scores``, see ``Head``:
            several outputs of a model, or several subsets of its classes.
        ignore_index: Target that does not count, such as -100; None counts all.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: A k is smaller than 1, or a head is wrong; or, before the first update, a k is larger than the
            number of classes, the targets are not class indices, or a head is not there.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "accuracy{_heads}/{dataset_key}{/weights}",
        "accuracy_top{topk}{_heads}/{dataset_key}{/weights}",
    )

    def __init__(
        self,
        topk: Sequence[PositiveInt] = (1,),
        heads: Mapping[str, Mapping[str, Any]] | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._accuracy = TopkAccuracy(topk, heads, ignore_index, f"callbacks.{self.display_name}")
        self.topk, self.heads = topk, heads  # which `logs` names

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            for name, hits, count in self._accuracy.hits(self.trainer.predict(inputs, model), targets):
                self.gathered.add((weights, name), hits, count=count)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for (weights, name), hits in self.gathered.totals.items():
            for metric, value in self._accuracy.accuracies(name, hits):
                self.writer.add_scalar(self.metric_key(metric, weights), value)
