"""Attributes that updates change and no checkpoint holds: a resume would begin with what the constructor gives them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.checkpoint.exchange import digest
from ksuit_runner.errors import CheckpointError, with_article
from ksuit_runner.trainer.sgd import SgdTrainer

_LOGGER = logging.getLogger(__name__)
_OF_TORCH = {**vars(nn.Module()), "state": None, "param_groups": None, "defaults": None}


class ForgottenState:
    """Looks for such attributes of a trainer, its model, loss and optimizers, between its first two updates.

    What has a way of its own to store its state is trusted: a trainer with ``extra_state``, a module with
    ``get_extra_state``, an optimizer with ``state_dict``. Only plain values and tensors without a graph are looked at.

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
        for path, holder, remedy in self._holders():
            known = {id(tensor) for tensor in _tensors(holder)}
            for name, value in vars(holder).items():
                if name in _OF_TORCH or id(value) in known or (isinstance(value, Tensor) and value.requires_grad):
                    continue
                try:
                    yield (path, type(holder).__name__, name, remedy), digest(name, value)
                except (CheckpointError, RuntimeError):  # it is no plain value, or has no data
                    continue

    def _holders(self) -> Iterator[tuple[str, Any, str]]:
        trainer = self._trainer
        if not trainer.has_extra_state:
            yield "trainer", trainer, "Then return it by extra_state()"
        for path, root in (("model", trainer.model.module), ("loss", trainer.loss)):
            for name, module in root.named_modules():
                if _is_own(module) and type(module).get_extra_state is nn.Module.get_extra_state:
                    yield f"{path}.{name}".rstrip("."), module, "Then make it a buffer"
        for name, member in trainer.optimizers.members.items():
            optimizer = member.optimizer
            if _is_own(optimizer) and type(optimizer).state_dict is Optimizer.state_dict:
                yield f"optimizer.{name}".rstrip("."), optimizer, "Then put it into its param_groups or its state"


def _is_own(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] != "torch"


def _tensors(holder: Any) -> Iterator[Tensor]:
    if isinstance(holder, nn.Module):
        yield from holder.parameters()
        yield from holder.buffers()
