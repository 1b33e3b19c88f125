"""Floating-point operations of what is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products, convolutions and attention in a ``with`` block.

    A multiplication and an addition are two, as in torch's ``FlopCounterMode``, whose formulas these are. That one
    takes composed operations apart; this one leaves what is computed alone, so that it may watch an update of training.
    Compiled code is computed without its compilation while it counts.

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
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def is_compiled(module: nn.Module) -> bool:
    """Whether the forward pass of a module, or of a module in it, was compiled in place."""
    return any(getattr(item, "_compiled_call_impl", None) is not None for item in module.modules())
