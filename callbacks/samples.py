"""Pictures of the training samples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.tensors.pictures import as_pictures, grid


class Samples(PeriodicCallback):
    """Logs a picture, ``NAME/train``: a row for each of some training samples, a column for each time it was drawn.

    A row shows what augmentations make of a sample: those of the dataset, of its wrappers, of the collate function and
    of ``to_device`` of a trainer, but not what ``training_step`` itself changes. The samples are spread from the first
    to the last one of the dataset, and are drawn for this picture only: training is not disturbed.

    Args:
        count: Number of samples.
        draws: How often each of them is drawn.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A number is smaller than 1; or, when they are drawn, the inputs are no pictures, or the dataset is
            a stream that this would move on.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, count: PositiveInt = 8, draws: PositiveInt = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", count=count, draws=draws)
        self.count, self.draws = count, draws

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if not self.data_container.world.records:
            return
        drawn = [self._pictures(draw) for draw in range(self.draws)]
        rows = torch.stack(drawn, dim=1).flatten(0, 1)
        self.writer.add_image(f"{self.display_name}/{self.data_container.train}", grid(rows, self.draws))

    def _pictures(self, draw: int) -> Tensor:
        batch = self.trainer.to_device(self.data_container.drawn_samples(self.count, draw))
        return as_pictures(self.trainer.inputs_and_targets(batch)[0], f"callbacks.{self.display_name}")
