"""Losses that are no finite numbers: seen at the update at which they occur."""

import logging
from collections.abc import Mapping
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError, LossError, suggest

_LOGGER = logging.getLogger(__name__)
_POLICIES = ("fail", "skip", "warn")
_LATEST = 1024


class LossCheck:
    """Looks at the loss of every update.

    Reading a loss waits for the device. On the CPU that costs nothing; on an accelerator the losses are collected on
    the device and looked at together, when a log or a checkpoint waits for it anyway. Only ``skip`` reads each one.

    Args:
        policy: ``fail`` raises an error, ``skip`` has the update left out, ``warn`` says so and goes on.
        is_late: Whether losses are collected on the device.

    Attributes:
        has_failed_late: Whether the weights have been changed since by a loss that was found late.

    Raises:
        ConfigError: There is no such policy.
    """

    def __init__(self, policy: Literal["fail", "skip", "warn"], is_late: bool) -> None:
        if policy not in _POLICIES:
            raise ConfigError(f"trainer.nan_loss: there is no '{policy}'. {suggest(policy, _POLICIES)}")
        self.has_failed_late = False
        self._policy = policy
        self._is_late = is_late and policy != "skip"
        self._losses: Tensor | None = None
        self._updates: list[int] = []

    def leaves_out(self, losses: Mapping[str, Tensor], update: int) -> bool:
        """Look at the losses of a forward pass, and return whether the update is left out.

        Args:
            losses: Losses by name, of which ``total`` counts.
            update: Number of updates before this one.

        Raises:
            LossError: It is no finite number, and the policy is ``fail``.
        """
        total = losses["total"]
        if self._is_late:
            self._collect(total.detach(), update + 1)
            return False
        value = total.item()
        return not isfinite(value) and self._react(value, update + 1)

    def settle(self) -> None:
        """Look at what was collected on the device.

        Raises:
            LossError: One of the losses is no finite number, and the policy is ``fail``.
        """
        if not self._updates or self._losses is None:
            return
        values, updates, self._updates = self._losses[: len(self._updates)].tolist(), self._updates, []
        for value, update in zip(values, updates, strict=True):
            if not isfinite(value):
                self.has_failed_late = self._policy == "fail"
                self._react(value, update)

    def _collect(self, total: Tensor, update: int) -> None:
        if self._losses is None:
            self._losses = torch.empty(_LATEST, dtype=torch.float32, device=total.device)
        self._losses[len(self._updates)].copy_(total)
        self._updates.append(update)
        if len(self._updates) == _LATEST:
            self.settle()

    def _react(self, value: float, update: int) -> bool:
        if self._policy == "fail":
            raise LossError(
                f"trainer.nan_loss: the loss of update {update} is {value}.\n"
                "To go on, resume with trainer.nan_loss=skip, which leaves such an update out, or trainer.nan_loss=warn"
            )
        done = "; it is left out" if self._policy == "skip" else ""
        _LOGGER.warning("the loss of update %d is %s%s", update, value, done)
        return self._policy == "skip"
