"""Attributes that updates change and no checkpoint holds: a resume would begin with what the constructor gives them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.checkpoint.exchange import digest
from ksuit_runner.errors import CheckpointError, with_article
from ksuit_runner.tensors.nested import tensors_in
from ksuit_runner.trainer.sgd import SgdTrainer

_LOGGER = logging.getLogger(__name__)
_OF_TORCH = {**vars(nn.Module()), "state": None, "param_groups": None, "defaults": None}
_WAYS = ("get_extra_state", "state_dict", "_save_to_state_dict")
"""Methods by which a module may store more than its parameters and buffers."""


class ForgottenState:
    """Looks for such attributes of a trainer, its model, loss and optimizers, between its first two updates.

    What has a way of its own to store its state is trusted: a trainer with ``extra_state``, a module with
    ``get_extra_state`` or the like, an optimizer with ``state_dict``. Only plain values are looked at, and tensors
    without a graph that are no other view of a parameter or buffer.

    Args:
        trainer: The trainer, after an update.
    """

    def __init__(self, trainer: SgdTrainer) -> None:
        self._trainer = trainer
        self._before = dict(self._attributes())

    def warn(self) -> None:
        """Warn of the attributes that another update has changed."""
        now = dict(self._attributes())
        for key in [key for key, value in now.items() if self._before.get(key, value) != value]:
            path, kind, name, remedy = key
            _LOGGER.warning(
                "%s: updates change '%s' of %s, which no checkpoint holds. If they use it, no resume is exact. %s",
                *(path, name, with_article(kind), remedy),
            )

    def _attributes(self) -> Iterator[tuple[tuple[str, str, str, str], str]]:
        roots = self._trainer.model.module, self._trainer.loss
        stored = {_memory(tensor) for root in roots for tensor in chain(root.parameters(), root.buffers())}
        for path, holder, remedy in self._holders():
            for name, value in vars(holder).items():
                if name in _OF_TORCH:
                    continue
                try:
                    if not any(tensor.requires_grad or _memory(tensor) in stored for tensor in tensors_in(value)):
                        yield (path, type(holder).__name__, name, remedy), digest(name, value)
                except (CheckpointError, RuntimeError):  # it is no plain value, or has no data
                    continue

    def _holders(self) -> Iterator[tuple[str, Any, str]]:
        trainer = self._trainer
        if not trainer.has_extra_state:
            yield "trainer", trainer, "Then return it by extra_state()"
        for path, root in (("model", trainer.model.module), ("loss", trainer.loss)):
            for name, module in root.named_modules():
                if _is_own(module) and all(getattr(type(module), way) is getattr(nn.Module, way) for way in _WAYS):
                    yield f"{path}.{name}".rstrip("."), module, "Then make it a buffer"
        for name, member in trainer.optimizers.members.items():
            optimizer = member.optimizer
            if _is_own(optimizer) and type(optimizer).state_dict is Optimizer.state_dict:
                yield f"optimizer.{name}".rstrip("."), optimizer, "Then put it into its param_groups or its state"


def _is_own(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] != "torch"


def _memory(tensor: Tensor) -> int:
    """Return what all views of a tensor have in common; its id, where there is no memory to be seen."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
