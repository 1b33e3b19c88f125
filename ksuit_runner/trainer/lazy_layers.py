"""Lazy layers: their sizes are set by a forward pass before anything is built on their parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import keyed


def materialize(model: nn.Module, inputs: Callable[[], Any], seed: int) -> None:
    """Set the sizes of lazy layers by a forward pass; their weights depend on the seed only.

    Args:
        model: The model, on its device.
        inputs: Returns a few inputs; called only if there are lazy layers.
        seed: Seed of the run.

    Raises:
        ConfigError: The forward pass failed, or did not use all of them.
    """
    if not _lazy(model):
        return
    names, modes = ", ".join(_lazy(model)[:3]), [(module, module.training) for module in model.modules()]
    reason = "some are not used"
    try:
        with torch.no_grad(), keyed(seed, "lazy layers"):
            model.eval()(inputs())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    for module, mode in modes:
        module.training = mode
    if _lazy(model):
        raise ConfigError(
            f"lazy layers ({names}) get their sizes from a forward pass over training inputs, and that failed "
            f"({reason}). Give them their sizes, or say what is inputs: `inputs_and_targets` of the trainer",
            path="model",
        )


def _lazy(model: nn.Module) -> list[str]:
    return [
        name.removeprefix("module.")
        for name, module in model.named_modules()
        if any(map(is_lazy, [*module._parameters.values(), *module._buffers.values()]))
    ]
