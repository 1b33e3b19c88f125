"""Mean accuracy over several datasets."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.config.types import DatasetKey
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.heads import Head


class Robustness(DatasetCallback):
    """Logs ``accuracy/DATASET`` of several datasets, and their mean as ``accuracy/NAME``, for all weights.

    NAME is the name of the callback; each dataset counts the same in the mean, whatever its size. Outputs are scores of
    shape (samples, ..., classes) or (samples, classes, ...), targets class indices of shape (samples, ...).

    Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
    ICLR 2019, arXiv:1903.12261.

    Args:
        dataset_key: Keys of the datasets, such as one for each corruption.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: There is no key, or one twice; or, before the first update, outputs or targets are something else.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = ("accuracy/{dataset_key}{/weights}", "accuracy/{name}{/weights}")

    def __init__(self, dataset_key: Sequence[DatasetKey], **kwargs: Any) -> None:
        if isinstance(dataset_key, str) or not dataset_key or len(set(dataset_key)) < len(dataset_key):
            raise ConfigError(f"dataset_key: a list of different datasets is needed, not {dataset_key}")
        super().__init__(dataset_key=dataset_key[0], **kwargs)
        self._head = Head(path=f"callbacks.{self.display_name}")
        for key in dataset_key[1:]:
            self.also_read(key, self.max_batches)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            scores, classes, _ = self._head.scores(self.trainer.predict(inputs, model), targets)
            self.gathered.add(weights, (scores.argmax(-1) == classes).sum(), count=classes.numel())

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights in self.gathered.totals:
            end = f"/{weights}" if weights else ""
            found = []
            for reader in self.readers:
                hits = reader.gathered.totals[weights]
                found.append(hits.sum.to(self.sum_dtype) / hits.count)
                self.writer.add_scalar(f"accuracy/{reader.dataset_key}{end}", found[-1])
            self.writer.add_scalar(f"accuracy/{self.display_name}{end}", torch.stack(found).mean())
