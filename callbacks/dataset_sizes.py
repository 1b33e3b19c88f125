"""Sizes of the datasets."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class DatasetSizes(CallbackBase):
    """Logs ``dataset_size/DATASET``, the number of samples of each dataset, once; of a stream it is unknown."""

    logs: ClassVar[Sequence[str] | None] = ("dataset_size/*",)

    def _before_training(self, update_counter: UpdateCounter) -> None:
        for key, dataset in self.data_container.datasets.items():
            if hasattr(dataset, "__len__"):
                self.writer.add_scalar(f"dataset_size/{key}", len(dataset))
