"""Metrics of torchmetrics of training itself."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.online import OnlineCallback
from ksuit_runner.trainer.batch_metric import batch_metrics
from ksuit_runner.trainer.heads import Head
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sums import Sums


class OnlineMetrics(OnlineCallback[Sums]):
    """Logs ``NAME/train`` for any metrics of torchmetrics that are sums, of the batches since they were last logged.

    They use the outputs that training computes anyway: in training mode, of augmented samples, and with the weights as
    they were at each update. A metric with a value for each class is logged as ``NAME_3/train``; with ``per_epoch`` the
    values of each epoch are ``NAME/train/epoch``. What a metric gets is as in ``DatasetMetrics``.

    A metric costs what torchmetrics takes for a batch. Only the first batch is validated, which waits for the device.

    Args:
        metrics: Metrics by name, each with its ``_target_``, and ``_partial_: true`` so that the number of classes is
            filled in. Those that hold all outputs are refused: their state would grow with every update.
        outputs: Path of the outputs where a model has several, such as ``digit`` or ``heads/0``.
        targets: Path of the targets where there are several.
        per_pixel: Refuse samples with a single target each: the metrics are those of a segmentation.
        **kwargs: Passed on to OnlineCallback.

    Raises:
        ConfigError: torchmetrics is not installed, or a metric is wrong or does not take the outputs and targets.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "{metrics}/train",
        "{metrics}/train/epoch",
        "{metrics}_*/train",
        "{metrics}_*/train/epoch",
    )

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
        self.metrics = batch_metrics(path, metrics, self.trainer.device, shape, sums_only=True)
        self._head = Head(outputs, targets, per_pixel=per_pixel, path=path)

    def _new_sums(self) -> Sums:
        return Sums(self.sum_dtype)

    def _summed(self) -> str:
        return repr([self._head, *((name, metric.description) for name, metric in self.metrics.items())])

    def _accumulate(self, sums: Sums, batch: Any, losses: Losses, outputs: Any) -> None:
        found = self._head.find(outputs, self.trainer.inputs_and_targets(batch)[1])
        for name, metric in self.metrics.items():
            metric.add(sums, (name,), *found)

    def _log(self, sums: Sums, suffix: str) -> None:
        for name, metric in self.metrics.items():
            for end, value in metric.values(sums.totals, {}, (name,)):
                self.writer.add_scalar(f"{name}{end}/train{suffix}", value)
