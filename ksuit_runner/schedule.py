"""Learning-rate schedules per update: a warm-up, then a curve from here or any scheduler of torch.

The curves are closed forms of (update, total updates): a run that is extended follows the curve of its new length.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR

from ksuit_runner.errors import ConfigError, did_you_mean

_NEEDS_METRIC = "steps with a metric, which a schedule does not get; use schedule=step, cosine or linear"
_NEEDS_OBJECTS = ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR")


class Curve(LambdaLR):
    """One factor on the learning rates of all groups; a step takes a fifth of the time of torch's LambdaLR."""

    def step(self, epoch: int | None = None) -> None:
        """Move on by one update."""
        if epoch is not None or self.last_epoch < 0:  # torch's constructor does the first step
            super().step(epoch)
            return
        self.last_epoch += 1
        factor = self.lr_lambdas[0](self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def get_last_lr(self) -> list[Any]:
        """Return the current learning rate of every group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rates that are multiplied with the curve."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the rates themselves are in the state of the optimizer."""
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])


def build_schedule(factory: Callable[..., LRScheduler], optimizer: Optimizer, total_updates: int) -> LRScheduler:
    """Build a schedule that steps at every update.

    Args:
        factory: A function or class of (optimizer, total_updates), or one of torch's classes with its arguments.
        optimizer: Optimizer whose learning rates it sets.
        total_updates: Length of the run, in updates.

    Raises:
        ConfigError: It steps with a metric, or its arguments do not fit.
    """
    target = getattr(factory, "func", factory)
    if not isinstance(target, type):
        return factory(optimizer, total_updates)
    if issubclass(target, lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(f"{target.__name__} {_NEEDS_METRIC}", path="schedule")
    wants_length = "total_updates" in inspect.signature(target).parameters
    try:
        return factory(optimizer, total_updates) if wants_length else factory(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target.__name__}: {error}", path="schedule") from error


def constant(optimizer: Optimizer, total_updates: int, warmup: float | int = 0) -> LRScheduler:
    """Keep the learning rate, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up: a fraction of the run below 1, or a number of updates.
    """
    return _with_curve(optimizer, total_updates, warmup, lambda progress: 1.0)


def linear(optimizer: Optimizer, total_updates: int, warmup: float | int = 0, end_factor: float = 0.0) -> LRScheduler:
    """Decay linearly to ``end_factor`` times the learning rate, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up: a fraction of the run below 1, or a number of updates.
        end_factor: Factor that is reached at the end.
    """
    return _with_curve(optimizer, total_updates, warmup, lambda progress: 1 - (1 - end_factor) * progress)


def cosine(optimizer: Optimizer, total_updates: int, warmup: float | int = 0, end_factor: float = 0.0) -> LRScheduler:
    """Decay along half a cosine to ``end_factor`` times the learning rate, after a linear warm-up.

    Source: Loshchilov and Hutter, SGDR, 2017 (https://arxiv.org/abs/1608.03983), without restarts.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up: a fraction of the run below 1, or a number of updates.
        end_factor: Factor that is reached at the end.
    """
    return _with_curve(
        optimizer,
        total_updates,
        warmup,
        lambda progress: end_factor + (1 - end_factor) * (1 + math.cos(math.pi * progress)) / 2,
    )


def from_torch(
    optimizer: Optimizer,
    total_updates: int,
    scheduler: str,
    arguments: Mapping[str, Any] | None = None,
    warmup: float | int = 0,
) -> LRScheduler:
    """Use any scheduler of ``torch.optim.lr_scheduler`` that steps without a metric, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates the scheduler sets.
        total_updates: Length of the run, in updates.
        scheduler: Name of the class, such as ``StepLR``.
        arguments: Its arguments, in updates after the warm-up; the text ``total_updates`` stands for the length of
            the run without the warm-up.
        warmup: Length of the warm-up: a fraction of the run below 1, or a number of updates.
    """
    classes = {name: item for name, item in vars(lr_scheduler).items() if _is_scheduler(item)}
    if scheduler == "ReduceLROnPlateau":
        raise ConfigError(f"{scheduler} {_NEEDS_METRIC}", path="schedule.scheduler")
    if scheduler in _NEEDS_OBJECTS:
        raise ConfigError(
            f"{scheduler} takes functions or schedulers, which a config cannot give", path="schedule.scheduler"
        )
    if scheduler not in classes:
        raise ConfigError(f"torch has no '{scheduler}'. {did_you_mean(scheduler, classes)}", path="schedule.scheduler")
    updates = _warmup_updates(warmup, total_updates)
    given = {
        key: total_updates - updates if value == "total_updates" else value for key, value in (arguments or {}).items()
    }
    try:
        main: LRScheduler = classes[scheduler](optimizer, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), path="schedule.arguments") from None
    if updates == 0:
        return main
    ramp = LambdaLR(optimizer, lambda update: (update + 1) / (updates + 1))
    return SequentialLR(optimizer, [ramp, main], milestones=[updates])


def follow_new_length(schedule: LRScheduler) -> None:
    """Set the learning rates to the curve's values, after a state was loaded from a run of another length.

    Schedulers of torch keep the rates of the stored state: they are no closed forms.
    """
    if isinstance(schedule, LambdaLR):
        groups = schedule.optimizer.param_groups
        for group, base, curve in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * curve(schedule.last_epoch)


def _with_curve(
    optimizer: Optimizer, total_updates: int, warmup: float | int, curve: Callable[[float], float]
) -> LRScheduler:
    updates = _warmup_updates(warmup, total_updates)
    rest = max(1, total_updates - updates)

    def factor(update: int) -> float:
        if update < updates:
            return (update + 1) / (updates + 1)
        return curve(min(1.0, (update - updates) / rest))

    return Curve(optimizer, factor)


def _is_scheduler(item: Any) -> bool:
    if not isinstance(item, type) or not issubclass(item, LRScheduler) or item.__name__.startswith("_"):
        return False
    return item not in (LRScheduler, lr_scheduler.ReduceLROnPlateau) and item.__name__ not in _NEEDS_OBJECTS


def _warmup_updates(warmup: float | int, total_updates: int) -> int:
    if warmup < 0:
        raise ConfigError(f"it must not be negative, and is {warmup}", path="schedule.warmup")
    return round(warmup * total_updates) if warmup < 1 else int(warmup)
