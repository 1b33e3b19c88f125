"""Activation checkpointing: activations are computed again in the backward pass instead of being kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ksuit_runner.tensors.name_patterns import matching_modules


def checkpoint_activations(module: nn.Module, patterns: Sequence[str]) -> None:
    """Let modules keep their inputs only until the backward pass, and compute the rest again there.

    Results are the same to the bit: random numbers of torch's generators are drawn again, and buffers, such as running
    statistics, change only once. The exception is compiled code, which draws other numbers than without it.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, https://arxiv.org/abs/1604.06174.

    Args:
        module: The model.
        patterns: Patterns of the names of its modules; ``{}`` stands for the number of a layer.

    Raises:
        ConfigError: A pattern matches no module.
    """
    named = {name: item for name, item in module.named_modules() if name}
    for name in matching_modules(patterns, named, "trainer.activation_checkpointing"):
        item = named[name]
        if not isinstance(item.forward, _Recomputed):
            item.forward = _Recomputed(item, item.forward)


class _Recomputed:
    """The forward pass of a module, computed again in the backward pass.

    Args:
        module: The module.
        forward: Its own forward pass.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # Compiled code changes buffers in its forward part only.
        has_buffers = not torch.compiler.is_compiling() and any(True for _ in self._module.buffers())
        contexts: dict[str, Any] = {"context_fn": self._contexts} if has_buffers else {}
        return checkpoint(self._forward, *args, use_reentrant=False, **contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _unchanged_buffers(self._module)


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put the buffers of a module back as they were before the block; autograd does not see that."""
    before = [
        (item._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
        for item in module.modules()
        for name, buffer in item._buffers.items()
    ]
    try:
        yield
    finally:
        for holder, name, buffer, values in before:
            holder[name] = buffer
            if buffer is not None and values is not None:
                buffer.data.copy_(values)
