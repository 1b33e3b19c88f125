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

    Attributes:
        module: The module that computes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._kept: list[_KeptBuffer] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs of the wrapped module."""
        return self.module(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on; the CPU for a model without any."""
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers, detached, by their names in the wrapped module."""
        return dict(self.module.state_dict())

    def keep_buffers(self) -> None:
        """Keep the buffers as they are, such as running statistics; those that never change are not copied again."""
        if self._kept is None:
            self._kept = [_KeptBuffer(name, buffer) for name, buffer in self.module.named_buffers()]
        for kept in self._kept:
            kept.keep()

    def give_back_buffers(self) -> None:
        """Give the buffers the values back that were kept."""
        for kept in self._kept or ():
            kept.give_back()


class _KeptBuffer:
    def __init__(self, name: str, buffer: Tensor) -> None:
        self._buffer = buffer
        self._copy = buffer.clone()
        self._version = buffer._version
        # The kernels of normalization layers change their statistics without counting that as a new version.
        self._always = name.rpartition(".")[2].startswith("running_")

    def keep(self) -> None:
        if self._always or self._buffer._version != self._version:
            self._copy.copy_(self._buffer)
            self._version = self._buffer._version

    def give_back(self) -> None:
        if self._always or self._buffer._version != self._version:
            self._buffer.copy_(self._copy)
            self._version = self._buffer._version
