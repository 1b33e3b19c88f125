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
        self._strategy = trainer.strategy

    @torch.no_grad()
    def of(self, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """Return the norms by the name of the module, each a scalar on the device; that of all together has no name.

        Args:
            value: Returns what a parameter counts with: a tensor of its shape, sparse or not, or None. A module that
                nothing counts for is left out.
        """
        found = {
            module: [item for item in map(value, items) if item is not None] for module, items in self.groups.items()
        }
        sizes = {module: len(items) for module, items in found.items() if items}
        if not sizes:
            return {}
        of_parameters = self._strategy.norms([_dense(item) for item in chain(*found.values())])
        of_modules = norms(torch.split(of_parameters, list(sizes.values())))
        return {"": torch.linalg.vector_norm(of_parameters), **dict(zip(sizes, of_modules, strict=True))}


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient of a parameter."""
    return parameter.grad


def _dense(value: Tensor) -> Tensor:
    """Return the stored values of a sparse tensor, which have its norm; any other one as it is."""
    return value.coalesce().values() if value.is_sparse else value
