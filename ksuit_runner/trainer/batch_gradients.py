"""How the losses of a batch become its gradients: the interface, and the simple case of a batch in one piece."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.trainer.gradients import forget_gradients
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.parts import WeighedPart


class Backward(Protocol):
    """Adds the gradients of a loss to those at the parameters."""

    def __call__(self, loss: Tensor, update: int, retain_graph: bool = False) -> None:
        """Do the backward pass of a loss in the update after so many updates."""


class BatchGradients(Protocol):
    """Turns the losses of the parts of a batch into gradients, and the loss, of the batch.

    Attributes:
        total: The loss of the batch, if it is kept.
        has_logged: Whether the training step of any rank has logged something in this update.
        needs_all_passes: Whether a part that is left out needs a backward pass as well.
    """

    total: Tensor
    has_logged: bool
    needs_all_passes: bool

    def keep_loss(self) -> None:
        """Keep the loss of the batch from now on; between two batches."""

    def start(self, computed: Sequence[WeighedPart], left_out: int) -> None:
        """Start with a batch.

        Args:
            computed: Its parts that are computed here.
            left_out: How many of this rank's parts are not computed because they have nothing of the loss.
        """

    def begin(self) -> None:
        """Begin with the forward pass of a part."""

    def counted(self, losses: Losses, weight: float) -> Tensor | None:
        """Return the part of the total loss that counts, detached; None if a part has nothing of it."""

    def add(self, part: WeighedPart, losses: Losses, update: int) -> None:
        """Compute the gradients of a part, in the update after so many updates."""

    def finish(self, word: UpdateWord, bad_loss: float, has_logged: bool) -> float:
        """Leave the gradients of the batch at the parameters.

        Args:
            word: What this rank has to say to the others; then what all of them have said.
            bad_loss: The sum of this rank's non-finite losses, or 0.
            has_logged: Whether this rank's training steps have logged something.

        Returns:
            The sum of the non-finite losses of all ranks, or 0.
        """

    def start_again(self) -> None:
        """Start with the same batch again."""


class WholeBatch:
    """The gradients of a batch that one rank computes in one piece: those of its loss.

    Args:
        parameters: What gradients are with respect to.
        backward: Does the backward pass of a loss.
        needs_all_passes: See ``BatchGradients``.
    """

    def __init__(self, parameters: Sequence[Tensor], backward: Backward, needs_all_passes: bool) -> None:
        self.total = torch.zeros(())
        self.has_logged = False
        self.needs_all_passes = needs_all_passes
        self._parameters = parameters
        self._backward = backward
        self._keeps_loss = False

    def keep_loss(self) -> None:
        """Keep the loss of the batch from now on."""
        self._keeps_loss = True

    def start(self, computed: Sequence[WeighedPart], left_out: int) -> None:
        """Start with a batch, which is its only part."""

    def begin(self) -> None:
        """Begin with the forward pass."""

    def counted(self, losses: Losses, weight: float) -> Tensor | None:
        """Return the total loss."""
        return losses["total"]

    def add(self, part: WeighedPart, losses: Losses, update: int) -> None:
        """Compute the gradients; what callbacks have left at the parameters is dropped."""
        forget_gradients(self._parameters)
        self._backward(losses["total"], update)
        if self._keeps_loss:
            self.total = losses["total"].detach()

    def finish(self, word: UpdateWord, bad_loss: float, has_logged: bool) -> float:
        """Return the sum of the non-finite losses, or 0: the gradients are in place."""
        self.has_logged = has_logged
        return bad_loss

    def start_again(self) -> None:
        """Start with the same batch again."""
