"""The wrapper that makes any module a model of a run."""

from typing import Any

import torch
from torch import Tensor, nn


class ModelBase(nn.Module):
    """What the runner asks of a model, around any ``torch.nn.Module``.

    The wrapped module needs no base class of ours. Its ``state_dict`` is what checkpoints hold, so that
    ``model.safetensors`` loads into the plain module, without the runner and whether it was compiled or not.

    Args:
        module: The module that computes.
        compile: Compile the forward pass.

    Attributes:
        module: The module that computes.
    """

    def __init__(self, module: nn.Module, compile: bool = False) -> None:
        super().__init__()
        self.module = module
        self._forward = torch.compile(module) if compile else module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs of the wrapped module, compiled if asked for."""
        return self._forward(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on; the CPU for a model without any."""
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers by their names in the wrapped module."""
        return dict(self.module.state_dict(keep_vars=False))
