"""Floating-point operations of what is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_RECURRENT = {
    _aten._cudnn_rnn: 1,
    _aten._cudnn_rnn_backward: 2,
    _aten.mkldnn_rnn_layer: 1,
    _aten.mkldnn_rnn_layer_backward: 2,
}
"""Recurrent layers that are one kernel, which torch's formulas lack -> how many products there are of each weight."""


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of matrix products, convolutions, recurrent layers and attention in a ``with`` block.

    A multiplication and an addition are two, as in torch's ``FlopCounterMode``, whose formulas these are. That one
    takes composed operations apart; this one leaves what is computed alone, so that it may watch an update of training.
    Compiled code is computed without its compilation while it counts. Kernels of one's own are not counted.

    Attributes:
        total: The operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute an operation, and count it."""
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in flop_registry:
            self.total += flop_registry[operator](*args, **(kwargs or {}), out_val=result)
        elif operator in _RECURRENT:
            self.total += _RECURRENT[operator] * _of_recurrent(*args)
        return result


def _of_recurrent(inputs: Tensor, weights: Sequence[Tensor] | Tensor, *others: Any) -> int:
    """Return the operations of a pass over sequences: every step multiplies with all weights."""
    matrices = [weights, others[0]] if isinstance(weights, Tensor) else [item for item in weights if item.ndim == 2]
    return 2 * inputs.shape[:-1].numel() * sum(item.numel() for item in matrices)


def is_compiled(module: nn.Module) -> bool:
    """Whether the forward pass of a module, or of a module in it, was compiled in place."""
    return any(getattr(item, "_compiled_call_impl", None) is not None for item in module.modules())
