"""An optimizer of a run, with its schedules, its limits of gradients and its state."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.checkpoint.state_types import copy_state
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.schedule import Schedule
from ksuit_runner.trainer.fused_adam import FusedStep
from ksuit_runner.trainer.optimizer_needs import switches_weights
from ksuit_runner.trainer.optimizer_state import load_optimizer_state, optimizer_state, without_loss


class Member:
    """An optimizer of a run.

    Args:
        optimizer: The optimizer.
        evaluates_again: Whether its step asks for evaluations of the loss, as a closure.
        schedules: What sets its options, by the name of the schedule in the config.
        clip_norm: Largest norm of its own gradients, or None.
        clip_value: Largest absolute value of an element of its gradients, or None.
        strategy: How the ranks share the training; by default there is one.
        configured_rates: Learning rates of the config, by config path.
        base_rates: Learning rates of the groups, by name, which follow from them and which a schedule changes.

    Attributes:
        parameters: All that it trains, frozen ones included.
        grad_norm: Norm of its own gradients before clipping, if it has a ``clip_norm``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluates_again: bool,
        schedules: Mapping[str, Schedule],
        clip_norm: float | None = None,
        clip_value: float | None = None,
        strategy: Strategy | None = None,
        configured_rates: Mapping[str, float] | None = None,
        base_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.optimizer, self.schedules, self.evaluates_again = optimizer, schedules, evaluates_again
        self.configured_rates, self.base_rates = configured_rates or {}, base_rates or {}
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters: list[nn.Parameter] = [item for group in optimizer.param_groups for item in group["params"]]
        self.grad_norm: Tensor | None = None
        self.switches_weights = switches_weights(optimizer)
        self.step = FusedStep(optimizer, (strategy or Strategy()).local)
        # Torch warns about a schedule that steps before the optimizer, as after a skipped update and in a fork. It sees
        # that by this attribute; a version without it warns, and no more.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self.train()

    @property
    def is_at_rest(self) -> bool:
        """Whether all learning rates are 0, as at the end of a schedule: a line search divides by them."""
        return not any(group.get("lr", 1.0) for group in self.optimizer.param_groups)

    @property
    def rate_factor(self) -> float:
        """What multiple of the rates of the config its learning rates are, where a schedule multiplies all alike."""
        name = max(self.base_rates, key=lambda group: self.base_rates[group])  # a rule may keep others at 0
        [rate] = (group["lr"] for group in self.optimizer.param_groups if group["name"] == name)
        return float(rate) / self.base_rates[name]

    def train(self) -> None:
        """Switch to the weights that are trained."""
        if self.switches_weights:
            self.optimizer.train()  # type: ignore[attr-defined]

    def evaluate(self) -> None:
        """Switch to the weights that are evaluated."""
        if self.switches_weights:
            self.optimizer.eval()  # type: ignore[attr-defined]

    def snapshot(self) -> Callable[[], None]:
        """Return what undoes a step."""
        weights = [item.detach().clone() for item in self.parameters]
        state = copy_state("optimizer", optimizer_state(self.optimizer))

        @torch.no_grad()
        def restore() -> None:
            for parameter, values in zip(self.parameters, weights, strict=True):
                parameter.copy_(values)
            load_optimizer_state(self.optimizer, state)

        return restore

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, by parameter name, and of its schedules."""
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"optimizer": optimizer_state(self.optimizer), **schedules}

    def load_state_dict(self, state: Mapping[str, Any], updates: int, same_settings: bool, has_loss: bool) -> None:
        """Load a stored state, see ``Optimizers.load_state_dict``."""
        stored = state["optimizer"] if has_loss else without_loss(state["optimizer"])
        load_optimizer_state(self.optimizer, stored, with_options=same_settings)
        for name, schedule in self.schedules.items():
            if same_settings:
                schedule.load_state_dict(state[name])
                continue
            for _ in range(updates):
                schedule.step()
