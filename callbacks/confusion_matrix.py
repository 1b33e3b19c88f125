"""Which classes are taken for which, on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.heads import Head
from ksuit_runner.ui.figures import draw_confusion_matrix


class ConfusionMatrix(DatasetCallback):
    """Shows how often each class is taken for each, as a picture and a table, for the live and all other weights.

    Both are called ``confusion_matrix/DATASET``. In the picture a row is a target, a column a prediction, and the color
    the share of the row. The table has a row for each pair that occurs, with ``target``, ``prediction``, ``count`` and
    ``share`` of the target: first the confusions, the most frequent one at the top, then what is right.

    Outputs are scores of shape (batch, ..., classes) or (batch, classes, ...), targets are class indices of shape
    (batch, ...). The counts take 8 bytes for each pair of classes, on the device.

    Args:
        classes: Names of the classes in their order; by default the dataset's ``classes``, unless ``outputs`` or
            ``targets`` name one of several, or else their numbers.
        outputs: Path of the scores where a model has several outputs, such as ``digit``.
        targets: Path of the targets where there are several.
        ignore_index: Target that does not count, such as -100; None counts all.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: The targets are not classes of the model, or there are not as many names; raised at the first
            evaluation.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        outputs: str = "",
        targets: str = "",
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        named = None if outputs or targets else self.data_container.datasets[self.dataset_key]
        self.classes = classes or getattr(named, "classes", None)
        self._path = f"callbacks.{self.display_name}"
        self._head = Head(outputs, targets, ignore_index=ignore_index, path=self._path)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            scores, wanted, counted = self._head.scores(self.trainer.predict(inputs, model), targets)
            self.gathered.add(weights, _pairs(scores, wanted, counted))

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, total in self.gathered.totals.items():
            counts, others = total.sum[:-1].cpu().numpy(), int(total.sum[-1])
            size = round(len(counts) ** 0.5)
            names = [str(name) for name in (range(size) if self.classes is None else self.classes)]
            if others:
                raise ConfigError(f"{others} targets are not in the {size} classes; see ignore_index", path=self._path)
            if len(names) != size:
                raise ConfigError(f"{len(names)} names, but {size} classes", path=f"{self._path}.classes")
            if self.data_container.world.records:
                self._show(self.metric_key("confusion_matrix", weights), counts.reshape(size, size), names)

    def _show(self, key: str, counts: NDArray[np.int64], names: Sequence[str]) -> None:
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        pairs = sorted(zip(*counts.nonzero(), strict=True), key=lambda pair: (pair[0] == pair[1], -counts[pair]))
        rows = [(names[pair[0]], names[pair[1]], int(counts[pair]), float(shares[pair])) for pair in pairs]
        self.writer.add_table(key, ("target", "prediction", "count", "share"), rows)
        self.writer.add_figure(key, draw_confusion_matrix(counts, shares, names))


def _pairs(scores: Tensor, targets: Tensor, counted: Tensor | None) -> Tensor:
    """Return how often each (target, prediction) occurs, and how many targets are no classes: (classes**2 + 1,)."""
    classes = scores.shape[-1]
    pairs = torch.where((targets >= 0) & (targets < classes), targets * classes + scores.argmax(-1), classes**2)
    if counted is not None:
        pairs = torch.where(counted, pairs, classes**2 + 1)
    return torch.bincount(pairs.flatten(), minlength=classes**2 + 2)[:-1]
