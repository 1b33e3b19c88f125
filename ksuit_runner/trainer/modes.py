"""Training and evaluation mode: only an update computes in training mode, whoever looks at the model otherwise."""

import logging
from typing import Any

from torch import nn

_LOGGER = logging.getLogger(__name__)
_NAMED = 3


class Modes:
    """Switches modules to evaluation mode between updates, and each back into its own mode.

    This happens at every update, so nothing is called: the flags are set, 0.1 us per module. What a callback does to
    the modes meanwhile is undone.

    Args:
        model: The model.
        loss: The loss module.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self._model, self._loss = model, loss
        self._modules: list[dict[str, Any]] = []
        self._training: list[dict[str, Any]] = []
        self._evaluates = False

    def start(self) -> None:
        """Put everything into training mode; a module that is to stay in evaluation mode overrides its ``train``."""
        before = {name: module for name, module in self._model.named_modules() if not module.training}
        self._model.train()
        self._loss.train()
        changed = {name for name, module in before.items() if module.training}
        highest = [name for name in before if name in changed and name.rpartition(".")[0] not in changed]
        if highest:
            names = ", ".join(highest[:_NAMED]) + (", ..." if len(highest) > _NAMED else "")
            _LOGGER.info("model: what came in evaluation mode is put into training mode: %s", names)
        self._evaluates = False
        self.look()

    def look(self) -> None:
        """Find the modules; they may have been replaced since."""
        evaluates = self._evaluates
        self.train()
        # A scripted module keeps its mode elsewhere; it is left as it is.
        modules = [vars(module) for root in (self._model, self._loss) for module in root.modules()]
        self._modules = [values for values in modules if "training" in values]
        if evaluates:
            self.evaluate()

    def evaluate(self) -> None:
        """Put everything into evaluation mode, if it is not."""
        if self._evaluates:
            return
        self._evaluates = True
        self._training = [values for values in self._modules if values["training"]]
        for values in self._training:
            values["training"] = False

    def train(self) -> None:
        """Put every module back into the mode that it had when it was put into evaluation mode."""
        if not self._evaluates:
            return
        self._evaluates = False
        if len(self._training) < len(self._modules):
            for values in self._modules:
                values["training"] = False
        for values in self._training:
            values["training"] = True
