"""Sizes of the datasets."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class DatasetSizes(CallbackBase):
    """Logs ``dataset_size/DATASET``, the number of samples of each dataset, once."""

    logs: ClassVar[Sequence[str] | None] = ("dataset_size/*",)

    def _before_training(self, update_counter: UpdateCounter) -> None:
        for key, dataset in self.data_container.datasets.items():
            self.writer.add_scalar(f"dataset_size/{key}", len(dataset))
