"""The backward pass of a loss: torch's engine, called without what ``Tensor.backward`` does around it."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from ksuit_runner.keyed_random import undisturbed
from ksuit_runner.tensors.flops import is_compiled


def backward(loss: Tensor, retain_graph: bool = False, inputs: Sequence[Tensor] | None = None) -> None:
    """Do ``loss.backward()``; for a plain loss by calling the engine directly.

    What torch's Python code does before takes 27 us, as long as the backward pass of a layer of a small model. A
    subclass of Tensor, a mode that watches torch's functions, chosen inputs, a loss that is no real scalar, and a
    torch whose private engine is not the one known here are left to it.

    Args:
        loss: A scalar with a graph.
        retain_graph: Whether another backward pass of the same graph follows.
        inputs: What gets gradients; by default all leaves of the graph.
    """
    is_plain = inputs is None and loss.numel() == 1 and loss.requires_grad and loss.is_floating_point()
    run = _engine() if is_plain and not has_torch_function_unary(loss) else None
    if run is None:
        try:
            loss.backward(retain_graph=retain_graph, inputs=inputs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if not loss.requires_grad:
                error.add_note("the loss depends on nothing that is trained: it is detached, or of torch.no_grad()")
            raise
    else:
        run((loss,), (torch.ones_like(loss),), retain_graph, False, (), allow_unreachable=True, accumulate_grad=True)


def extra_gradients(loss: Tensor, parameters: Sequence[Tensor], scaler: torch.amp.GradScaler) -> list[Tensor]:
    """Return the gradients of a loss by a backward pass of its own, which that of training does not notice.

    Args:
        loss: A scalar, whose graph is kept.
        parameters: What gets gradients; there are none of those on which the loss does not depend.
        scaler: Scales the loss of float16, and so the gradients.
    """
    with torch.enable_grad(), undisturbed():  # the backward pass of training draws the same again
        found = torch.autograd.grad(scaler.scale(loss), parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def allow_several_passes(model: nn.Module) -> None:
    """Let the graphs of a compiled model serve several backward passes, for which torch keeps some more memory.

    Its compiler otherwise reuses the memory of activations in the first one. Called before anything is computed.
    """
    if is_compiled(model):
        torch._functorch.config.donated_buffer = False


@lru_cache
def _engine() -> Callable[..., Any] | None:
    """Return the private function of this version of torch that runs backward passes, or None if it is another one."""
    with torch.enable_grad():
        weight = torch.ones((), requires_grad=True)
        loss = weight * 3
    try:
        run: Callable[..., Any] = torch.autograd.Variable._execution_engine.run_backward
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    except Exception:
        return None
    return run if weight.grad is not None and weight.grad.item() == 3 else None
