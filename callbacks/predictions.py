"""A table of predictions, the worst ones first, and pictures of their samples."""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.config.types import NonNegativeInt, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.tensors.pictures import as_pictures, grid
from ksuit_runner.trainer.heads import Head, classes_last

_COLUMNS = ("sample", "target", "prediction", "loss", "confidence")


class Predictions(DatasetCallback):
    """Logs a table ``NAME/DATASET`` of the samples that are predicted worst, the worst one first, for all weights.

    With targets that are class indices, a row has the number of the sample in the dataset, target, prediction, loss
    (cross-entropy) and confidence (probability of the prediction). With targets of the outputs' shape the loss is the
    squared error. Where a sample has several targets, such as tokens, its loss is their mean, and the other cells are
    empty.

    Args:
        count: Number of rows; None for all samples.
        outputs: Path of the outputs in what the model returns, such as ``digit``; empty where there is one tensor.
        targets: Path of the targets in those of the batch, in the same way.
        images: How many of these samples to show in a picture of the same name, in the same order, from left to right.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: The count is smaller than 1; or, before the first update, outputs and targets do not fit, or the
            inputs are no pictures.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        count: PositiveInt | None = 50,
        images: NonNegativeInt = 0,
        outputs: str = "",
        targets: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", count=count)
        check_numbers("NonNegativeInt", images=images)
        self.count, self.images = count, images
        self._path = f"callbacks.{self.display_name}"
        self._head = Head(outputs, targets, path=self._path)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, all_targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            outputs, targets = self._head.find(self.trainer.predict(inputs, model), all_targets)
            is_value = targets.is_floating_point() and targets.shape == outputs.shape
            found = (targets, outputs, (outputs - targets).square()) if is_value else self._scored(outputs, targets)
            self.gathered.add_rows(weights, _columns(*found))

    def _scored(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return target, prediction, loss and confidence of each sample."""
        scores = classes_last(outputs, targets, self._path).float()
        losses = cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
        confidence, predictions = scores.softmax(-1).max(-1)
        return targets, predictions, losses, confidence

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, rows in self.gathered.rows.items():
            worst = rows[:, 2].argsort(descending=True, stable=True)[: self.count]
            key = self.metric_key(self.display_name, weights)
            table = [
                [sample, *map(_value, row)] for sample, row in zip(worst.tolist(), rows[worst].tolist(), strict=True)
            ]
            self.writer.add_table(key, _COLUMNS[: 1 + rows.shape[1]], table)
            if self.images and self.data_container.world.records:
                shown = torch.stack(self.inputs_of(worst[: self.images].tolist()))
                self.writer.add_image(key, grid(as_pictures(shown, self._path), ceil(sqrt(len(shown)))))


def _columns(*columns: Tensor) -> Tensor:
    """Return one value of each column for each sample; of several, the mean loss, and NaN for what has no mean."""
    flat = [column.flatten(1) if column.ndim > 1 else column.unsqueeze(1) for column in columns]
    means = [column.float().mean(1) for column in flat]
    if flat[0].shape[1] > 1:
        means = [mean if index == 2 else torch.full_like(mean, torch.nan) for index, mean in enumerate(means)]
    return torch.stack(means, dim=1)


def _value(value: float) -> float | int | None:
    """Return a value of the table: classes as whole numbers."""
    return None if value != value else int(value) if value.is_integer() else value
