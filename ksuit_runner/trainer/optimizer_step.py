"""From a loss to other weights: the scale of float16, the limits of gradients, the optimizers, their schedules."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import LBFGS

from ksuit_runner.distributed.pieces import is_sharded
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.backward import backward
from ksuit_runner.trainer.gradients import clip_gradients, clip_values, forget_gradients
from ksuit_runner.trainer.optimizer_member import Member
from ksuit_runner.trainer.optimizers import Optimizers
from ksuit_runner.trainer.turns import Turn


class SkippedEvaluation(Exception):
    """An optimizer evaluated the loss again, and it was not finite: the update is skipped."""


class Evaluation(Protocol):
    """Evaluates the loss of the batch again, and leaves its gradients at the parameters.

    Attributes:
        known: The loss at the weights as they are.
    """

    known: Tensor

    def __call__(self) -> Tensor:
        """Return the loss, a scalar."""


class OptimizerStep:
    """Computes gradients, and lets the optimizers step whose turn it is, with gradients that are unscaled and clipped.

    Afterwards the gradients are dropped, and all schedules advance, whoever's turn it was, and if nobody has stepped.

    Args:
        optimizers: The optimizers of the run.
        clip_norm: Largest norm of all gradients of an update together, without those that have a limit of their own.
        scaler: Scales the losses of float16.
        strategy: How the ranks share the training.

    Attributes:
        grad_norm: Norm of the gradients before they were clipped together, at the last step; or None.

    Raises:
        ConfigError: One of the optimizers cannot train in float16.
    """

    def __init__(
        self, optimizers: Optimizers, clip_norm: float | None, scaler: torch.amp.GradScaler, strategy: Strategy
    ) -> None:
        if scaler.is_enabled():
            _check_scaled(optimizers, strategy)
        self.grad_norm: Tensor | None = None
        self._optimizers, self._turns = optimizers, optimizers.turns
        self._clip_norm, self._scaler, self._strategy = clip_norm, scaler, strategy
        self._is_unscaled = False

    @property
    def is_clipped(self) -> bool:
        """Whether gradients are clipped by their norm."""
        return self._clip_norm is not None or any(
            member.clip_norm is not None for member in self._optimizers.members.values()
        )

    def backward(self, loss: Tensor, update: int, retain_graph: bool = False) -> None:
        """Add the gradients of a loss; where optimizers take turns, only of the parameters whose turn it is.

        Args:
            loss: The loss, a scalar.
            update: Number of updates before this one.
            retain_graph: Whether another backward pass of the same graph follows.
        """
        inputs = None
        if self._turns.are_taken and not self._strategy.is_sharded:  # where other tensors are computed with
            inputs = self._turns.at(update).trained()
        if inputs == []:  # all frozen at present
            return
        backward(self._scaler.scale(loss), retain_graph, inputs)

    def settle_turn(self, update: int) -> None:
        """Drop the gradients of the parameters whose turn it is not; called once the gradients are complete.

        Raises:
            KsuitError: The loss depends on nothing of what is trained in this turn.
        """
        if self._turns.are_taken:
            self._turns.drop_others(update)
            self._turns.check_gradients(update)

    def unscale(self, update: int) -> None:
        """Divide the gradients by the factor that keeps small ones in float16, unless that is done."""
        if self._scaler.is_enabled() and not self._is_unscaled:
            for member in self._turns.at(update).with_gradients():
                self._scaler.unscale_(member.optimizer)
            self._is_unscaled = True

    def step(self, update: int, again: Evaluation | None = None, can_skip: bool = False) -> None:
        """Clip the gradients, and change the weights by them.

        Args:
            update: Number of updates before this one.
            again: Evaluates the loss for those that ask for it; its gradients are clipped like the first ones.
            can_skip: Whether such an evaluation may turn out not to be finite.

        Raises:
            SkippedEvaluation: It is not; the step is undone.
        """
        turn = self._turns.at(update)
        self._clip(turn, update)
        if self._scaler.is_enabled():
            self._step_scaled(turn)
        else:
            for member in turn.members:
                if not member.evaluates_again or again is None:
                    member.step()
                elif not member.is_at_rest:
                    self._search(member, turn, update, again, can_skip)
        self._finish()

    def skip(self, update: int) -> None:
        """Leave out the step of an update, whose gradients may have been unscaled for it."""
        if self._is_unscaled and self._turns.at(update).with_gradients():
            self._scaler.update()
        self._finish()

    def forget_gradients(self) -> None:
        """Drop the gradients of all parameters."""
        forget_gradients(self._optimizers.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms of gradients that are known: after it, updates may be skipped, or another's turn."""
        members = {name: member.grad_norm for name, member in self._optimizers.members.items()}
        return {"together": self.grad_norm, "own": members}

    def load_state_dict(self, state_dict: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state_dict`` returned, as far as this run clips; a fork may clip others."""
        if self._clip_norm is not None:
            self.grad_norm = _on(device, state_dict["together"])
        for name, member in self._optimizers.members.items():
            if member.clip_norm is not None:
                member.grad_norm = _on(device, state_dict["own"].get(name))

    def _finish(self) -> None:
        self._is_unscaled = False
        self.forget_gradients()
        self._optimizers.advance()

    def _step_scaled(self, turn: Turn) -> None:
        members = turn.with_gradients()
        for member in members:
            self._scaler.step(member.optimizer)
        if members:
            self._scaler.update()

    def _search(self, member: Member, turn: Turn, update: int, again: Evaluation, can_skip: bool) -> None:
        # It asks first for the loss at the weights as they are, which is known; others may change them before that.
        known = [again.known] if type(member.optimizer) is LBFGS else []

        def closure() -> Tensor:
            if known:
                return known.pop()
            with torch.enable_grad():
                loss = again()
            self._clip(turn, update)
            return loss

        restore = member.snapshot() if can_skip else None
        try:
            member.optimizer.step(closure)  # type: ignore[arg-type]
        except SkippedEvaluation:
            assert restore is not None
            restore()
            raise

    def _clip(self, turn: Turn, update: int) -> None:
        if self._clip_norm is not None:
            self.unscale(update)
        for member in turn.members:
            if member.clip_value is not None:
                self.unscale(update)
                clip_values(member.parameters, member.clip_value, self._strategy)
            if member.clip_norm is not None:
                self.unscale(update)
                member.grad_norm = clip_gradients(member.parameters, member.clip_norm, self._strategy)
        if self._clip_norm is not None and turn.clipped_together:
            self.grad_norm = clip_gradients(turn.clipped_together, self._clip_norm, self._strategy)


def _on(device: torch.device, norm: Tensor | None) -> Tensor | None:
    return None if norm is None else norm.to(device)


def _check_scaled(optimizers: Optimizers, strategy: Strategy) -> None:
    """Check that all optimizers can train with losses that are scaled."""
    for member in optimizers.members.values():
        if member.evaluates_again:
            name = type(member.optimizer).__name__
            raise ConfigError(f"float16 does not fit {name}, which evaluates the loss again", path="trainer.precision")
        if strategy.is_sharded and len(set(map(is_sharded, member.parameters))) > 1:
            raise ConfigError(
                "float16 does not fit strategy=fsdp where some parameters are not spread over the ranks: those of the "
                "loss and those without dimensions are not. Use bfloat16",
                path="trainer.precision",
            )
