"""Loss on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.periodic_callback import DatasetCallback
from ksuit_runner.trainer.losses import LossMeans


class Loss(DatasetCallback):
    """Logs ``loss/DATASET``, the mean over all samples, for the live and all other weights.

    Where the loss ignores targets or weighs classes, or ``training_step`` returns a count, it is the mean over what
    counts, see ``SgdTrainer.weight``. Other losses that ``training_step`` names are logged as ``loss_NAME/DATASET``.

    Args:
        **kwargs: Passed on to DatasetCallback.
    """

    shares_batch: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "loss/{dataset_key}",
        "loss/{dataset_key}/*",
        "loss_*/{dataset_key}",
        "loss_*/{dataset_key}/*",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._means: dict[str, LossMeans] = {}

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        size, weight = self.trainer.batch_size(batch), self.trainer.weight(batch)
        for weights, model in models.items():
            losses, _ = self.trainer.forward(batch, model)
            means = self._means.setdefault(weights, LossMeans(self.trainer.sums_up, self.sum_dtype))
            means.add(losses, weight, size)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, means in self._means.items():
            for name, value in means.means().items():
                self.writer.add_scalar(self.metric_key("loss" if name == "total" else f"loss_{name}", weights), value)
        self._means = {}
