"""Norms of parameters, and of tensors like them, module by module."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ksuit_runner.models.chosen_modules import by_module
from ksuit_runner.tensors.foreach import norms
from ksuit_runner.trainer.parameter_rules import named_parameters
from ksuit_runner.trainer.sgd import SgdTrainer


class ModuleNorms:
    """Computes the Euclidean norms of all parameters in a module together, for each of several modules.

    The parameters of the loss are in a module named ``loss``. Where parameters are spread over ranks, a norm is that of
    the whole, and all ranks have to ask for it.

    Args:
        trainer: Trainer of the run.
        match: Patterns of the names of the modules, see ``by_module``.
        depth: How many parts of a parameter's name say which module it belongs to, see ``by_module``.
        path: Config path of what asks for it, for messages.

    Attributes:
        groups: The parameters by the name of their module.

    Raises:
        ConfigError: A pattern matches nothing, or the depth is no positive whole number.
    """

    def __init__(self, trainer: SgdTrainer, match: Sequence[str] | None, depth: int | None, path: str) -> None:
        named = named_parameters(trainer.model.module, trainer.loss)
        found = by_module(list(named), trainer.model.module, match, depth, path)
        self.groups = {module: [named[name] for name in names] for module, names in found.items()}
        self._strategy, self._device = trainer.strategy, trainer.device

    def of(self, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """Return the norms by the name of the module, each a scalar on the device; that of all together has no name.

        Args:
            value: Returns what a parameter counts with: a tensor of its shape, sparse or not, or None. A module that
                nothing counts for is left out.
        """
        sizes, of_modules, whole = self._computed(value)
        held = {module: norm for module, norm, size in zip(self.groups, of_modules, sizes, strict=True) if size}
        return {"": whole, **held} if held else {}

    def row(self, value: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
        """Return the norms of all modules in their order, of shape (modules,), in float32; 0 where nothing counts."""
        return torch.stack(list(self._computed(value)[1])).float()

    @torch.no_grad()
    def _computed(self, value: Callable[[nn.Parameter], Tensor | None]) -> tuple[list[int], Sequence[Tensor], Tensor]:
        """Return for how many parameters of each module something counts, the norms, and that of all together."""
        found = [[item for item in map(value, items) if item is not None] for items in self.groups.values()]
        sizes, values = list(map(len, found)), [dense_values(item) for item in chain(*found)]
        of_parameters = self._strategy.norms(values) if values else torch.zeros(0, device=self._device)
        return sizes, norms(torch.split(of_parameters, sizes)), torch.linalg.vector_norm(of_parameters)


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient of a parameter."""
    return parameter.grad


def dense_values(value: Tensor) -> Tensor:
    """Return the stored values of a sparse tensor, which have its norm; any other one as it is."""
    return value.coalesce().values() if value.is_sparse else value
