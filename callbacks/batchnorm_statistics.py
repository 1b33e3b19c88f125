"""Running statistics of BatchNorm for averaged weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter


class BatchnormStatistics(DatasetCallback):
    """Computes the running statistics of averaged weights anew, as means over the batches of a dataset.

    Averaged weights have the running statistics of the live model, with which they perform badly. The new statistics
    are used by callbacks that are listed after this one and evaluate at the same update, and they are in the checkpoint
    of that update; from the next update on they are the live model's again. It takes one forward pass for each batch
    and each average, which every rank does itself. For a model without BatchNorm nothing is read.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018,
    https://arxiv.org/abs/1803.05407; the result is that of ``torch.optim.swa_utils.update_bn`` without dropout.

    Args:
        **kwargs: Passed on to DatasetCallback; ``dataset_key`` is that of the training data.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        layers = [layer for model in self._averages().values() for layer in _layers(model)]
        for layer in layers:
            layer.reset_running_stats()
        if layers:
            super()._periodic_callback(update_counter)

    def _averages(self) -> dict[str, nn.Module]:
        return {name: model for name, model in self.trainer.evaluation_models.items() if name}

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        for model in self._averages().values():
            if layers := _layers(model):
                with _cumulating(layers):
                    self.trainer.forward(batch, model)

    def _process_results(self, update_counter: UpdateCounter) -> None: ...


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [item for item in model.modules() if isinstance(item, _BatchNorm) and item.track_running_stats]


@contextmanager
def _cumulating(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let layers, and nothing else, be in training mode, and count all batches alike."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.training, layer.momentum = True, None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.training, layer.momentum = False, momentum
