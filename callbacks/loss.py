"""The loss on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.periodic_callback import DatasetCallback


class Loss(DatasetCallback):
    """Logs ``loss/DATASET``, the mean over all samples, for the live and all other weights.

    Other losses that the trainer's ``training_step`` names are logged as ``loss_NAME/DATASET``.

    Args:
        **kwargs: Passed on to DatasetCallback.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "loss/{dataset_key}",
        "loss/{dataset_key}/*",
        "loss_*/{dataset_key}",
        "loss_*/{dataset_key}/*",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        size = self.trainer.batch_size(batch)
        for weights, model in models.items():
            losses, _ = self.trainer.forward(batch, model)
            for name, loss in losses.items():
                key = self.metric_key("loss" if name == "total" else f"loss_{name}", weights)
                value = loss.to(self.sum_dtype) * size
                self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._count += size

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for key, value in self._sums.items():
            self.writer.add_scalar(key, value / self._count)
        self._sums, self._count = {}, 0
