"""Logs how sure the model is of what it predicts."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ksuit_runner import DatasetCallback, UpdateCounter


class Confidence(DatasetCallback):
    """Logs ``confidence/DATASET``, the mean probability of the class that is predicted."""

    logs = ("confidence/{dataset_key}{/weights}",)
    shares_work = True  # the ranks of a run share the batches

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, _ = batch
        for weights, model in models.items():  # the live weights, and averaged ones if there are any
            highest = self.trainer.predict(inputs, model).softmax(dim=1).amax(dim=1)
            self.gathered.add(weights, highest.sum(), count=len(highest))

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, total in self.gathered.totals.items():
            self.writer.add_scalar(self.metric_key("confidence", weights), total.mean)
