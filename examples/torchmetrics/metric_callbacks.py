"""Callbacks around the metrics of torchmetrics: one that evaluates a dataset, and one that follows training."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ksuit_runner import DatasetCallback, PeriodicCallback, UpdateCounter


class Evaluated(DatasetCallback):
    """Logs ``NAME/DATASET`` for metrics of a whole dataset, for the live weights and for all others that are offered.

    Args:
        metrics: Metrics by name, which take scores of shape (samples, classes) and classes of shape (samples,).
        **kwargs: Passed on to DatasetCallback.
    """

    # It changes neither the batch nor the outputs, so that these are computed once for it, `accuracy` and `loss`.
    shares_batch = True

    def __init__(self, metrics: Mapping[str, Metric], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = {name: metric.to(self.trainer.device) for name, metric in metrics.items()}
        for metric in self.metrics.values():
            metric.distributed_available_fn = lambda: False  # each rank of a run sees all batches
        self._of_weights: dict[str, dict[str, Metric]] = {}

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            outputs = self.trainer.predict(inputs, model)
            for metric in self._of_weights.setdefault(weights, deepcopy(self.metrics)).values():
                metric.update(outputs, targets)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, metrics in self._of_weights.items():
            for name, metric in metrics.items():
                self.writer.add_scalar(self.metric_key(name, weights), metric.compute())
        self._of_weights = {}


class Followed(PeriodicCallback):
    """Logs ``NAME/train`` for metrics of all batches since it was last logged.

    Their sums are part of the run's state: a resumed run logs what the run that was not interrupted logs.

    Args:
        metrics: Metrics by name, which take scores of shape (samples, classes) and classes of shape (samples,).
        **kwargs: Passed on to PeriodicCallback.
    """

    # A second one with another interval would log other values under the same key.
    is_repeatable = False

    def __init__(self, metrics: Mapping[str, Metric], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = {name: metric.to(self.trainer.device) for name, metric in metrics.items()}
        for metric in self.metrics.values():
            metric.persistent(True)  # its sums belong to its state_dict
            metric.distributed_available_fn = lambda: False  # `_over_ranks` knows of ranks that are lost

    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Mapping[str, Tensor], outputs: Any
    ) -> None:
        _, targets = self.trainer.inputs_and_targets(batch)
        for metric in self.metrics.values():
            metric.update(outputs.detach(), targets)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for name, metric in self.metrics.items():
            self.writer.add_scalar(f"{name}/train", self._over_ranks(metric))
            metric.reset()

    def _over_ranks(self, metric: Metric) -> Tensor:
        """Return the value over all batches; each rank of a run has its own parts of them, and the sums of these."""
        whole, held = deepcopy(metric), metric.metric_state
        of_ranks = self.data_container.world.gather_tensors(list(held.values()))
        for name, sums in zip(held, zip(*of_ranks, strict=True), strict=True):
            setattr(whole, name, torch.stack(sums).sum(0).to(self.trainer.device))
        return whole.compute()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the metrics since they were last logged, and how many batches it is made of."""
        return {
            name: {"sums": metric.state_dict(), "batches": metric.update_count} for name, metric in self.metrics.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of the metrics."""
        for name, metric in self.metrics.items():
            metric.load_state_dict(state_dict[name]["sums"])
            metric._update_count = state_dict[name]["batches"]  # compute() warns of metrics without a batch
