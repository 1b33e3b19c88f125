"""Loss on a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.trainer.losses import add_losses, mean_losses


class Loss(DatasetCallback):
    """Logs ``loss/DATASET``, the mean over all samples, for the live and all other weights.

    Where the loss ignores targets or weighs classes, or ``training_step`` returns a count, it is the mean over what
    counts, see ``SgdTrainer.weight``. Other losses that ``training_step`` names are logged as ``loss_NAME/DATASET``.

    Args:
        **kwargs: Passed on to DatasetCallback.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = ("loss/{dataset_key}{/weights}", "loss_*/{dataset_key}{/weights}")

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        size, weight = self.trainer.batch_size(batch), self.trainer.weight(batch)
        for weights, model in models.items():
            losses, _ = self.trainer.forward(batch, model)
            add_losses(self.gathered, losses, weight, size, self.trainer.sums_up, of=(weights,))

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for (weights, name), value in mean_losses(self.gathered.totals, self.trainer.loss_weights).items():
            self.writer.add_scalar(self.metric_key("loss" if name == "total" else f"loss_{name}", weights), value)
