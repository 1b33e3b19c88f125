"""Units that are never active."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.chosen_modules import chosen_modules, tapped
from ksuit_runner.tensors.nested import tensors_in


class DeadUnits(DatasetCallback):
    """Logs ``dead_units/MODULE/DATASET``, the fraction of a module's units that no sample makes positive.

    It also logs ``dead_units/DATASET``, the fraction in all these modules together, and both for the live and all other
    weights. A unit of a ReLU that is zero for all samples has no gradient, and mostly stays dead. Where the ReLU is a
    function and not a module, name the layer before it: what counts is that its output is never positive.

    Units are the channels of a convolution, of shape (samples, units, height, width) and the like, and the last
    dimension of anything else, (samples, ..., units).

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None takes each ``nn.ReLU``
            and ``nn.ReLU6``.
        unit_dim: The dimension of the units, such as 1 after ``nn.Conv1d``; None as above.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: A pattern matches no module, or one that is never called; or, without patterns, there is no such
            module.
    """

    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "dead_units/{dataset_key}{/weights}",
        "dead_units/*/{dataset_key}{/weights}",
    )

    def __init__(self, match: Sequence[str] | None = None, unit_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        found = chosen_modules(self.model.module, match or ["*"], None, path)
        self._modules = [name for name, item in found.items() if match or isinstance(item, nn.ReLU | nn.ReLU6)]
        if not self._modules:
            raise ConfigError(
                "the model has no nn.ReLU: name the modules, or the layers before a ReLU, such as 'hidden.{}'",
                path=f"{path}.match",
            )
        self._unit_dim = unit_dim

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        for weights, model in models.items():
            module = model.module if isinstance(model, ModelBase) else model
            modules = {name: module.get_submodule(name) for name in self._modules}
            # Compiled code may know nothing of the hooks.
            with tapped(modules, partial(self._count, weights)), torch.compiler.set_stance("force_eager"):
                self.trainer.forward(batch, model)

    def _count(self, weights: str, module: str, outputs: Any) -> None:
        output: Tensor = next(tensors_in(outputs))  # of several ones, such as a recurrent layer has, the first
        dim = self._unit_dim if self._unit_dim is not None else 1 if output.ndim > 3 else -1
        active = (output > 0).movedim(dim, -1).flatten(0, -2).sum(0)
        self.gathered.add((weights, module), active)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        by_weights: dict[str, list[Tensor]] = {}
        for (weights, module), active in self.gathered.totals.items():
            is_dead = (active.sum == 0).to(self.sum_dtype)
            by_weights.setdefault(weights, []).append(is_dead)
            self.writer.add_scalar(self.metric_key(f"dead_units/{module}".rstrip("/"), weights), is_dead.mean())
        for weights, are_dead in by_weights.items():
            self.writer.add_scalar(self.metric_key("dead_units", weights), torch.cat(are_dead).mean())
