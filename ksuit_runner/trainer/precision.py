"""The type in which forward pass and loss are computed, and the scale that float16 needs for it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ksuit_runner.errors import ConfigError, did_you_mean

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_CONTEXT = nullcontext()


class Precision:
    """Computes in a type of torch; the weights stay in float32.

    Args:
        name: ``float32``, ``bfloat16`` or ``float16``.
        device: Device of the run.

    Attributes:
        dtype: The type.
        scaler: Keeps small gradients in float16; it does nothing for the others.

    Raises:
        ConfigError: There is no such type.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in _TYPES:
            raise ConfigError(f"there is no '{name}'. {did_you_mean(name, _TYPES)}", path="trainer.precision")
        self.dtype = _TYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")
        self._device_type = device.type

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which to compute."""
        if self.dtype is torch.float32:  # an autocast context that changes nothing takes as long as a small layer
            return _NO_CONTEXT
        return torch.autocast(self._device_type, dtype=self.dtype)
