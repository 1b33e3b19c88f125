"""Top-k accuracy on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.trainer.heads import Head
from ksuit_runner.trainer.hits import checked_topk, count_hits


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
        ConfigError: A k is smaller than 1, or a head is wrong; or, at the first evaluation, a k is larger than the
            number of classes, the targets are not class indices, or a head is not there.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "accuracy{_heads}/{dataset_key}",
        "accuracy{_heads}/{dataset_key}/*",
        "accuracy_top{topk}{_heads}/{dataset_key}",
        "accuracy_top{topk}{_heads}/{dataset_key}/*",
    )

    def __init__(
        self,
        topk: Sequence[int] = (1,),
        heads: Mapping[str, Mapping[str, Any]] | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.topk = checked_topk(topk)
        self._path = f"callbacks.{self.display_name}"
        self.heads = {
            name: Head.from_config(f"{self._path}.heads.{name}", {"ignore_index": ignore_index, **given})
            for name, given in (heads or {}).items()
        }
        self._heads = self.heads or {"": Head(ignore_index=ignore_index, path=self._path)}

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            outputs = self.trainer.predict(inputs, model)
            for name, head in self._heads.items():
                scores, classes, counted = head.scores(outputs, targets)
                hits = count_hits(scores, classes, self.topk[-1], self._path, counted)
                count = classes.numel() if counted is None else counted.sum()
                self.gathered.add((weights, name), hits, count=count)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for (weights, name), hits in self.gathered.totals.items():
            for k in self.topk:
                metric = "accuracy" if k == 1 else f"accuracy_top{k}"
                value = hits.sum[:k].sum().to(self.sum_dtype) / hits.count
                self.writer.add_scalar(self.metric_key(f"{metric}_{name}" if name else metric, weights), value)
