"""Training and evaluation mode: only updates compute in training mode, callbacks see the model in evaluation mode."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ksuit_runner.models.kept_buffers import KeptBuffers

_LOGGER = logging.getLogger(__name__)
_NAMED = 3


class SwitchesWeights(Protocol):
    """Evaluates other weights than it trains, as a schedule-free optimizer does."""

    def evaluate(self) -> None:
        """Put the weights to evaluate in place."""

    def train(self) -> None:
        """Put the weights to train in place."""


class Modes:
    """Switches modules to evaluation mode between updates, and each back to its own mode.

    This happens at every update, so no ``train()`` is called: the flags are set, 0.1 us per module. Changes that a
    callback makes to the modes are undone.

    Args:
        model: The model.
        loss: The loss module.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self._model, self._loss = model, loss
        self._kept_buffers: list[KeptBuffers] = []
        self._modules: list[dict[str, Any]] = []
        self._training: list[dict[str, Any]] = []
        self._held: list[nn.Module] = []
        self._evaluates = False

    def start(self) -> None:
        """Switch everything to training mode; a module that has to stay in evaluation mode overrides its ``train``."""
        before = {name: module for name, module in self._model.named_modules() if not module.training}
        self._switch_to_training()
        changed = {name for name, module in before.items() if module.training}
        highest = [name for name in before if name in changed and name.rpartition(".")[0] not in changed]
        if highest:
            names = ", ".join(highest[:_NAMED]) + (", ..." if len(highest) > _NAMED else "")
            _LOGGER.info("model: modules that were in evaluation mode are switched to training mode: %s", names)
        self._evaluates = False
        self.find_modules()

    def hold(self, modules: Sequence[nn.Module]) -> None:
        """Keep modules in evaluation mode in updates as well, instead of those that were held before."""
        self._held = list(modules)
        evaluates, self._evaluates = self._evaluates, False
        self._switch_to_training()
        self.find_modules()
        if evaluates:
            self.evaluate()

    def _switch_to_training(self) -> None:
        self._model.train()
        self._loss.train()
        for module in self._held:
            module.eval()

    def find_modules(self) -> None:
        """Find the modules again; they may have been replaced."""
        evaluates = self._evaluates
        self.train()
        # A scripted module has its mode elsewhere and is left alone.
        modules = [vars(module) for root in (self._model, self._loss) for module in root.modules()]
        self._modules = [values for values in modules if "training" in values]
        if evaluates:
            self.evaluate()

    def evaluate(self) -> None:
        """Switch everything to evaluation mode, unless it is already."""
        if self._evaluates:
            return
        self._evaluates = True
        self._training = [values for values in self._modules if values["training"]]
        for values in self._training:
            values["training"] = False

    def train(self) -> None:
        """Switch every module back to the mode that it had before ``evaluate``."""
        if not self._evaluates:
            return
        self.put_back()
        self._evaluates = False
        if len(self._training) < len(self._modules):
            for values in self._modules:
                values["training"] = False
        for values in self._training:
            values["training"] = True

    def put_back_of(self, kept_buffers: KeptBuffers) -> None:
        """Put back the buffers of a model or loss, too, that evaluations change."""
        kept_buffers.is_used = True
        self._kept_buffers.append(kept_buffers)

    def put_back(self) -> None:
        """Undo what forward passes in evaluation mode have changed in buffers."""
        for item in self._kept_buffers:
            if item.kept:
                item.put_back()

    @contextmanager
    def evaluation(self, optimizers: Sequence[SwitchesWeights], parameters: Sequence[Tensor]) -> Iterator[None]:
        """Switch everything to evaluation mode while the block runs, and then back; by ``eval()``, if that does more.

        Optimizers that evaluate other weights than they train, and modules that merge weights for evaluation
        (adapters), change the weights, which are restored to the bit.

        Args:
            optimizers: Optimizers that evaluate other weights.
            parameters: What they and the modules may change.
        """
        self.put_back()  # what a callback has computed is nothing to others
        modules = [module for root in (self._model, self._loss) for module in root.modules()]
        switches = [module for module in modules if type(module).train is not nn.Module.train]
        scripted = [(module, module.training) for module in modules if "training" not in vars(module)]
        modes = [(vars(module), module.training) for module in modules if "training" in vars(module)]
        has_other_weights = bool(switches or optimizers)
        kept = [item.detach().clone() for item in parameters] if has_other_weights else []
        for optimizer in optimizers:
            optimizer.evaluate()
        if switches or scripted:
            self._model.eval()
            self._loss.eval()
        else:
            for values, _ in modes:
                values["training"] = False
        try:
            yield
        finally:
            self.put_back()
            for module in switches:
                module.train()
            for module, mode in scripted:
                module.training = mode
            for values, mode in modes:
                values["training"] = mode
            for optimizer in optimizers:
                optimizer.train()
            with torch.no_grad():
                for parameter, before in zip(parameters, kept, strict=has_other_weights):
                    parameter.copy_(before)
