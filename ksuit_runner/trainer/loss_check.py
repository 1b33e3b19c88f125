"""Checks of the losses that a training step returns, and the policy for non-finite ones."""

import logging
from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError, KsuitError, LossError, did_you_mean

_LOGGER = logging.getLogger(__name__)
_POLICIES = ("fail", "skip", "warn")
_LATEST = 1024


def check_losses(trainer: str, result: Any) -> None:
    """Check what a training step has returned.

    Args:
        trainer: Name of the trainer's class.
        result: What it returned.

    Raises:
        KsuitError: It is not a pair of losses by name, with a ``total``, and outputs.
    """
    wanted = "it has to return ({'total': loss, ...}, outputs), with a scalar tensor for each loss"
    step = f"{trainer}.training_step"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
        raise KsuitError(f"{step} returns a {type(result).__name__}; {wanted}", path="trainer")
    losses = result[0]
    if "total" not in losses:
        hint = f"; sum up {', '.join(map(repr, losses))} for it" if losses else ""
        raise KsuitError(f"{step} returns no 'total', which is what is minimized{hint}: {wanted}", path="trainer")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise KsuitError(f"{step} returns a {found} as '{name}'; {wanted}", path="trainer")
    if torch.is_grad_enabled() and not losses["total"].requires_grad:
        raise KsuitError(f"{step} returns a 'total' without a gradient with respect to any parameter", path="trainer")


class LossCheck:
    """Checks the loss of every update.

    Reading a loss waits for the device. On the CPU that costs nothing; on an accelerator the losses are collected on
    the device and checked together, when a log or a checkpoint waits for it anyway. Only ``skip`` reads each one.

    Args:
        policy: What a non-finite loss does: ``fail`` raises an error, ``skip`` skips the update, ``warn`` warns.
        is_late: Whether losses are collected on the device.
        max_skips: Largest number of updates in a row that are skipped.

    Attributes:
        skips: Number of updates in a row that have been skipped up to now.
        has_failed_late: Whether weights were changed by a non-finite loss before it was found.

    Raises:
        ConfigError: The policy is unknown.
    """

    def __init__(self, policy: Literal["fail", "skip", "warn"], is_late: bool, max_skips: int = 10) -> None:
        if policy not in _POLICIES:
            raise ConfigError(f"there is no '{policy}'. {did_you_mean(policy, _POLICIES)}", path="trainer.nan_loss")
        self.has_failed_late = False
        self.skips = 0
        self._max_skips = max_skips
        self._policy = policy
        self._is_late = is_late and policy != "skip"
        self._losses: Tensor | None = None
        self._updates: list[int] = []

    def must_skip(self, losses: Mapping[str, Tensor], update: int) -> bool:
        """Check the losses of a forward pass, and return whether the update is skipped.

        Args:
            losses: Losses by name, scalars; ``total`` is checked.
            update: Number of updates before this one.

        Raises:
            LossError: It is non-finite, and the policy is ``fail``, or too many in a row were skipped.
        """
        total = losses["total"]
        if self._is_late:
            self._collect(total.detach(), update + 1)
            return False
        value = total.item()
        return not isfinite(value) and self._react(value, update + 1)

    def settle(self) -> None:
        """Check the losses that were collected on the device.

        Raises:
            LossError: One of them is non-finite, and the policy is ``fail``.
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
                f"the loss of update {update} is {value}.\n"
                "To continue, resume with trainer.nan_loss=skip, which skips such an update, or trainer.nan_loss=warn",
                path="trainer.nan_loss",
            )
        if self._policy == "skip" and self.skips >= self._max_skips:
            before = f", and the {self.skips} before it were skipped" if self.skips else ""
            raise LossError(
                f"the loss of update {update} is {value}{before}; nothing is learned", path="trainer.max_skips"
            )
        done = "; it is skipped" if self._policy == "skip" else ""
        _LOGGER.warning("the loss of update %d is %s%s", update, value, done)
        return self._policy == "skip"
