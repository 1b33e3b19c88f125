"""Metrics of torchmetrics on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.trainer.batch_metric import batch_metrics
from ksuit_runner.trainer.heads import Head


class DatasetMetrics(DatasetCallback):
    """Logs ``NAME/DATASET`` for any metrics of torchmetrics, for the live and all other weights.

    A metric with a value for each class is logged as ``NAME_3/DATASET``, and one with several values by name as
    ``NAME_KEY/DATASET``. A metric gets the outputs and targets of a batch, of the same shape, or scores of shape
    (batch, classes, ...) and class indices of shape (batch, ...); where the model has the classes last, they are moved.
    The number of classes is filled in. Results are those of torchmetrics, with floating-point sums in float64, and to
    the last bit the same on any number of ranks, see ``BatchMetric``.

    Metrics that hold all outputs, such as an exact AUROC, take memory in proportion to the dataset.

    Args:
        metrics: Metrics by name, each with its ``_target_``, and ``_partial_: true`` so that the number of classes is
            filled in.
        outputs: Path of the outputs where a model has several, such as ``digit`` or ``heads/0``.
        targets: Path of the targets where there are several.
        per_pixel: Refuse samples with a single target each: the metrics are those of a segmentation.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: torchmetrics is not installed, or a metric is wrong or does not take the outputs and targets.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = ("{metrics}/{dataset_key}{/weights}", "{metrics}_*/{dataset_key}{/weights}")

    def __init__(
        self,
        metrics: Mapping[str, Any],
        outputs: str = "",
        targets: str = "",
        per_pixel: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        shape = () if outputs else self.data_container.known_shapes().get("output_shape", ())
        self.metrics = batch_metrics(path, metrics, self.trainer.device, shape)
        self._head = Head(outputs, targets, per_pixel=per_pixel, path=path)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            found = self._head.find(self.trainer.predict(inputs, model), targets)
            for name, metric in self.metrics.items():
                metric.add(self.gathered, (weights, name), *found)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        evaluated = dict.fromkeys(weights for weights, *_ in self.gathered.totals)
        for weights in evaluated:
            for name, metric in self.metrics.items():
                for end, value in metric.values(self.gathered.totals, self.gathered.rows, (weights, name)):
                    self.writer.add_scalar(self.metric_key(name + end, weights), value)
