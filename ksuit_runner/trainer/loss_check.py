"""The policy for non-finite losses."""

import logging
from contextlib import suppress
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from ksuit_runner.config.types import NonNegativeInt, check_numbers
from ksuit_runner.errors import ConfigError, LossError, did_you_mean
from ksuit_runner.tensors.nested import tensors_in

_LOGGER = logging.getLogger(__name__)
_POLICIES = ("fail", "skip", "warn")
_LATEST = 1024


class LossCheck:
    """Checks the losses of the parts of every update.

    A part whose loss is not finite is left out; what becomes of the update is decided after the last part, when the
    ranks have met: the same on all of them.

    Reading a loss waits for the device. On the CPU that costs nothing; on an accelerator the losses are collected on
    the device and checked together, when a log or a checkpoint waits for it anyway. Only ``skip`` reads each one.

    Args:
        policy: What a non-finite loss does: ``fail`` raises an error, ``skip`` skips the update, ``warn`` warns.
        is_late: Whether losses are collected on the device.
        max_skips: Largest number of updates in a row that are skipped.

    Attributes:
        skips: Number of updates in a row that have been skipped up to now.
        skips_updates: Whether it skips updates.
        bad_loss: Sum of the non-finite losses of the present update that were left out; 0 if there is none.
        has_failed_late: Whether weights were changed by a non-finite loss before it was found.

    Raises:
        ConfigError: The policy is unknown, or the number is negative.
    """

    def __init__(self, policy: Literal["fail", "skip", "warn"], is_late: bool, max_skips: NonNegativeInt = 10) -> None:
        if policy not in _POLICIES:
            raise ConfigError(f"there is no '{policy}'. {did_you_mean(policy, _POLICIES)}", path="trainer.nan_loss")
        check_numbers("NonNegativeInt", "trainer", max_skips=max_skips)
        self.has_failed_late = False
        self.skips = 0
        self.bad_loss = 0.0
        self._has_bad_batch = False
        self._max_skips = max_skips
        self._policy = policy
        self.skips_updates = policy == "skip"
        self._is_late = is_late and policy != "skip"
        self._losses: Tensor | None = None
        self._updates: list[int] = []

    def leaves_out(self, total: Tensor, update: int, batch: Any) -> bool:
        """Check the loss of a part, and return whether it is left out.

        Args:
            total: The loss that is minimized, a scalar.
            update: Number of updates before this one.
            batch: The part of the batch.
        """
        if self._is_late:
            self._collect(total.detach(), update + 1)
            return False
        value = total.item()
        if isfinite(value):
            return False
        self._has_bad_batch |= not all(map(_is_finite, tensors_in(batch)))
        if self._policy == "warn":
            return self._react(value, update + 1)
        self.bad_loss += value
        return True

    def must_skip(self, bad_loss: float, update: int) -> bool:
        """Return whether an update is skipped.

        Args:
            bad_loss: Sum of the non-finite losses of all ranks; 0 if there is none.
            update: Number of updates before this one.

        Raises:
            LossError: There is one, and the policy is ``fail``, or too many in a row were skipped.
        """
        self.bad_loss = 0.0
        return bad_loss != 0 and self._react(bad_loss, update + 1)

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
        why = ": not all values of its batch are finite" if self._has_bad_batch else ""
        self._has_bad_batch = False
        if self._policy == "fail":
            raise LossError(
                f"the loss of update {update} is {value}{why}.\n"
                "To continue, resume with trainer.nan_loss=skip, which skips such an update, or trainer.nan_loss=warn",
                path="trainer.nan_loss",
            )
        if self._policy == "skip" and self.skips >= self._max_skips:
            before = f", and the {self.skips} before it were skipped" if self.skips else ""
            raise LossError(
                f"the loss of update {update} is {value}{why}{before}; nothing is learned", path="trainer.max_skips"
            )
        done = "; it is skipped" if self._policy == "skip" else ""
        _LOGGER.warning("the loss of update %d is %s%s%s", update, value, why, done)
        return self._policy == "skip"


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite, as far as torch can tell: it cannot of every type and layout."""
    with suppress(RuntimeError):
        return bool(tensor.isfinite().all())
    return True
