"""Sizes of the datasets."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class DatasetSizes(CallbackBase):
    """Records ``dataset_size/DATASET``, the number of samples of each, among the parameters of the run.

    Of a stream it is unknown.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def _before_training(self, update_counter: UpdateCounter) -> None:
        datasets = self.data_container.datasets.items()
        self.tracker.log_params(
            {f"dataset_size/{key}": len(data) for key, data in datasets if hasattr(data, "__len__")}
        )
