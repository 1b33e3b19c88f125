"""Loss on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.periodic_callback import DatasetCallback


class Loss(DatasetCallback):
    """Logs ``loss/DATASET``, the mean over all samples, for the live and all other weights.

    Where the loss ignores targets or weighs classes, it is the mean over what counts, see ``SgdTrainer.weight``. Other
    losses that the trainer's ``training_step`` names are means over samples, logged as ``loss_NAME/DATASET``.

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
        self._sums: dict[str, tuple[float | Tensor, float | Tensor]] = {}

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        size, weight = self.trainer.batch_size(batch), self.trainer.weight(batch)
        for weights, model in models.items():
            losses, _ = self.trainer.forward(batch, model)
            for name, loss in losses.items():
                loss = loss.to(self.sum_dtype)
                if name == "total":
                    self._add(self.metric_key("loss", weights), self._sum(loss, weight), weight)
                else:
                    self._add(self.metric_key(f"loss_{name}", weights), loss * size, size)

    def _sum(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Return the sum that the total loss of a batch is the mean of; over nothing the mean is NaN, and the sum 0."""
        if self.trainer.sums_up:
            return loss
        return torch.where(weight > 0, loss * weight, 0.0) if isinstance(weight, Tensor) else loss * weight

    def _add(self, key: str, value: Tensor, weight: float | Tensor) -> None:
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = total + value, count + weight

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for key, (value, weight) in self._sums.items():
            self.writer.add_scalar(key, value / weight)
        self._sums = {}
