"""Schedules of the learning rate, or of another option: a warm-up, then a curve from here or a scheduler of torch.

The curves are closed forms of (update, total updates): a run that is extended follows the curve of its new length. At
the last update each has its end value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from ksuit_runner.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ksuit_runner.config.types import (
        FractionBelowOne,
        MetricKey,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveFloat,
    )

Interval = Literal["update", "epoch"]

_NEEDS_OBJECTS = ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR")


class Schedule(Protocol):
    """What sets the options of an optimizer's groups: the schedulers of torch, and those of this module."""

    def step(self) -> None:
        """Move on by one update."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


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


class Paced:
    """Sets an option of an optimizer's groups to the rates that a schedule gives to stand-ins of the groups.

    The schedule can so set another option than the learning rate, step more rarely than at every update, and start
    after a warm-up.

    Args:
        optimizer: Optimizer whose groups have the option.
        build: Builds the schedule for an optimizer.
        option: Name of the option.
        every: Number of updates between two steps of the schedule; with 0 only ``observe`` steps it.
        warmup: Length of the linear warm-up, in updates.
        metric: Key of the metric that the schedule steps with.

    Attributes:
        inner: The schedule.
        metric: Key of the metric that it steps with, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        build: Callable[[Optimizer], Any],
        option: str = "lr",
        every: int = 1,
        warmup: int = 0,
        metric: str | None = None,
    ) -> None:
        self.metric = metric
        self._optimizer, self._option = optimizer, option
        self._every, self._warmup = every, warmup
        groups = [{"params": [torch.zeros(1)], "lr": group[option]} for group in optimizer.param_groups]
        self._stand_in = SGD(groups, lr=optimizer.defaults[option])
        self._stand_in._opt_called = True  # type: ignore[attr-defined]  # torch warns about one that never steps
        self.inner = build(self._stand_in)
        self._updates, self._observed = 0, -1
        self.apply()

    def step(self) -> None:
        """Move on by one update."""
        self._updates += 1
        if self._every and self._updates > self._warmup and self._updates % self._every == 0:
            self.inner.step()
        self.apply()

    def observe(self, value: float, update: int) -> None:
        """Step with the value that the metric has after an update; each update counts once."""
        if update > max(self._observed, self._warmup):
            self._observed = update
            self.inner.step(value)
            self.apply()

    def check_direction(self, direction: str) -> None:
        """Check that the schedule takes those values of its metric for the better ones that are.

        Args:
            direction: ``higher``, ``lower``, or anything else if neither is better.

        Raises:
            ConfigError: It takes the others.
        """
        better = {"higher": "max", "lower": "min"}.get(direction, self.inner.mode)
        if self.inner.mode != better:
            raise ConfigError(f"{direction} values of '{self.metric}' are better: write {better}", path="schedule.mode")

    def apply(self) -> None:
        """Set the option of the groups."""
        is_warm = self._updates >= self._warmup
        factor = 1.0 if is_warm else (self._updates + 1) / (self._warmup + 1)
        for group, other in zip(self._optimizer.param_groups, self._stand_in.param_groups, strict=True):
            group[self._option] = other["lr"] if is_warm else other["lr"] * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the state of the schedule, and the rates that it has set."""
        rates = [group["lr"] for group in self._stand_in.param_groups]
        inner = self.inner.state_dict()
        return {"updates": self._updates, "observed": self._observed, "inner": inner, "rates": rates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._updates, self._observed = state_dict["updates"], state_dict["observed"]
        self.inner.load_state_dict(state_dict["inner"])
        for group, rate in zip(self._stand_in.param_groups, state_dict["rates"], strict=True):
            group["lr"] = rate
        self.apply()


def constant(
    optimizer: Optimizer, total_updates: int, warmup: NonNegativeFloat | str = 0, updates_per_epoch: int | None = None
) -> LRScheduler:
    """Keep the learning rate, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up: a fraction of the run below 1, a number of updates, or a text such as
            ``2 epochs``.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """
    return _with_curve(optimizer, total_updates, updates_per_epoch, warmup, "update", lambda progress: 1.0)


def linear(
    optimizer: Optimizer,
    total_updates: int,
    warmup: NonNegativeFloat | str = 0,
    end_factor: NonNegativeFloat = 0.0,
    end_value: NonNegativeFloat | None = None,
    interval: Interval = "update",
    updates_per_epoch: int | None = None,
) -> LRScheduler:
    """Decay linearly, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up, as in ``constant``.
        end_factor: Factor on the learning rate at the last update.
        end_value: Learning rate at the last update, instead of a factor; groups with another rate keep its proportion.
        interval: How often the rate changes; a warm-up in epochs is rounded up to whole ones.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """
    end = _end_factor(optimizer, end_factor, end_value)
    return _with_curve(
        optimizer, total_updates, updates_per_epoch, warmup, interval, lambda progress: 1 - (1 - end) * progress
    )


def cosine(
    optimizer: Optimizer,
    total_updates: int,
    warmup: NonNegativeFloat | str = 0,
    end_factor: NonNegativeFloat = 0.0,
    end_value: NonNegativeFloat | None = None,
    interval: Interval = "update",
    updates_per_epoch: int | None = None,
) -> LRScheduler:
    """Decay along half a cosine, after a linear warm-up.

    Source: Loshchilov and Hutter, SGDR, 2017 (https://arxiv.org/abs/1608.03983), without restarts.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up, as in ``constant``.
        end_factor: Factor on the learning rate at the last update.
        end_value: Learning rate at the last update, instead of a factor; groups with another rate keep its proportion.
        interval: How often the rate changes; a warm-up in epochs is rounded up to whole ones.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """
    end = _end_factor(optimizer, end_factor, end_value)
    return _with_curve(
        optimizer,
        total_updates,
        updates_per_epoch,
        warmup,
        interval,
        lambda progress: end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2,
    )


def from_torch(
    optimizer: Optimizer,
    total_updates: int,
    scheduler: str,
    arguments: Mapping[str, Any] | None = None,
    warmup: NonNegativeFloat | str = 0,
    interval: Interval = "update",
    updates_per_epoch: int | None = None,
) -> Schedule:
    """Use any scheduler of ``torch.optim.lr_scheduler`` that steps without a metric, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates the scheduler sets.
        total_updates: Length of the run, in updates.
        scheduler: Name of the class, such as ``StepLR``.
        arguments: Its arguments, in updates after the warm-up, or in epochs of the run; the text ``total_updates``
            stands for the number of steps that it does in this run.
        warmup: Length of the warm-up, as in ``constant``.
        interval: How often the scheduler is stepped.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """
    classes = {name: item for name, item in vars(lr_scheduler).items() if _is_scheduler(item)}
    if scheduler not in classes:
        usable = [name for name, item in classes.items() if not _lacks(item)]
        raise ConfigError(f"torch has no '{scheduler}'. {did_you_mean(scheduler, usable)}", path="schedule.scheduler")
    kind = classes[scheduler]
    check_scheduler(kind, "schedule.scheduler")
    updates, every = warmup_updates(warmup, total_updates, updates_per_epoch), _length(interval, updates_per_epoch)
    steps = total_updates - updates if every == 1 else -(-total_updates // every)
    given = {key: steps if value == "total_updates" else value for key, value in (arguments or {}).items()}

    def build(groups: Optimizer) -> LRScheduler:
        try:
            built: LRScheduler = kind(groups, **given)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error), path="schedule.arguments") from None
        return built

    if every > 1:
        return Paced(optimizer, build, every=every, warmup=updates)
    main = build(optimizer)
    if updates == 0:
        return main
    ramp = LambdaLR(optimizer, lambda update: (update + 1) / (updates + 1))
    return SequentialLR(optimizer, [ramp, main], milestones=[updates])


def exponential(
    optimizer: Optimizer,
    total_updates: int,
    warmup: NonNegativeFloat | str = 0,
    end_factor: PositiveFloat = 0.01,
    end_value: PositiveFloat | None = None,
    interval: Interval = "update",
    updates_per_epoch: int | None = None,
) -> LRScheduler:
    """Change exponentially to another learning rate, lower or higher, after a linear warm-up.

    Args:
        optimizer: Optimizer whose learning rates are multiplied with the curve.
        total_updates: Length of the run, in updates.
        warmup: Length of the warm-up, as in ``constant``.
        end_factor: Factor on the learning rate at the last update, above 0.
        end_value: Learning rate at the last update, instead of a factor; groups with another rate keep its proportion.
        interval: How often the rate changes; a warm-up in epochs is rounded up to whole ones.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """
    end = _end_factor(optimizer, end_factor, end_value)
    if not end:
        name = "end_factor" if end_value is None else "end_value"
        raise ConfigError("a number above 0 is needed, which an exponential never reaches", path=f"schedule.{name}")
    return _with_curve(optimizer, total_updates, updates_per_epoch, warmup, interval, lambda progress: end**progress)


def plateau(
    optimizer: Optimizer,
    total_updates: int,
    metric: MetricKey,
    mode: Literal["min", "max"] = "min",
    factor: FractionBelowOne = 0.1,
    patience: NonNegativeInt = 10,
    threshold: NonNegativeFloat = 1e-4,
    cooldown: NonNegativeInt = 0,
    min_lr: NonNegativeFloat = 0.0,
    warmup: NonNegativeFloat | str = 0,
    updates_per_epoch: int | None = None,
) -> Schedule:
    """Reduce the learning rate when a metric has stopped improving, with torch's ``ReduceLROnPlateau``.

    Args:
        optimizer: Optimizer whose learning rates it sets.
        total_updates: Length of the run, in updates.
        metric: Key of the metric; every value that is logged after the warm-up counts.
        mode: Whether lower values are better (``min``), or higher ones (``max``).
        factor: Factor of each reduction, below 1.
        patience: Number of values in a row without an improvement before the rate is reduced.
        threshold: Smallest improvement that counts, relative to the best value.
        cooldown: Number of values after a reduction that do not count.
        min_lr: Smallest learning rate.
        warmup: Length of the warm-up, as in ``constant``.
        updates_per_epoch: Length of an epoch, in updates, if it has one.
    """

    def build(groups: Optimizer) -> ReduceLROnPlateau:
        try:
            return ReduceLROnPlateau(
                groups, mode, factor, patience, threshold, cooldown=cooldown, min_lr=min_lr, eps=0.0
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error), path="schedule") from None

    updates = warmup_updates(warmup, total_updates, updates_per_epoch)
    return Paced(optimizer, build, every=0, warmup=updates, metric=metric)


def _with_curve(
    optimizer: Optimizer,
    total_updates: int,
    updates_per_epoch: int | None,
    warmup: float | str,
    interval: Interval,
    curve: Callable[[float], float],
) -> LRScheduler:
    every = _length(interval, updates_per_epoch)
    first = -(-warmup_updates(warmup, total_updates, updates_per_epoch) // every)
    rest = max(1, (total_updates - 1) // every - first)

    def factor(update: int) -> float:
        position = update // every
        if position < first:
            return (position + 1) / (first + 1)
        return curve(min(1.0, (position - first) / rest))

    return Curve(optimizer, factor)


def _end_factor(optimizer: Optimizer, factor: float, value: float | None) -> float:
    for name, end in (("end_factor", factor), ("end_value", value)):
        if end is not None and not 0 <= end < math.inf:
            raise ConfigError(f"a number of at least 0 is needed, not {end}", path=f"schedule.{name}")
    if value is None:
        return factor
    start = float(optimizer.defaults["lr"])
    if not start:
        raise ConfigError("a value of 0 cannot be changed by a curve, which multiplies it", path="schedule.end_value")
    return value / start


def check_scheduler(kind: type, path: str) -> None:
    """Check that a scheduler needs no more than an optimizer and what a config can give.

    Args:
        kind: Its class, of torch or of a project.
        path: Config path of the schedule.

    Raises:
        ConfigError: It needs a metric, functions or other schedulers.
    """
    if lacks := _lacks(kind):
        raise ConfigError(f"{kind.__name__} {lacks}", path=path)


def _lacks(kind: type) -> str:
    """Return why a config cannot describe a scheduler of this class; empty if it can."""
    if issubclass(kind, ReduceLROnPlateau):
        return "steps with a metric; write schedule=plateau, with schedule.metric"
    if kind.__name__ in _NEEDS_OBJECTS and kind.__module__ == lr_scheduler.__name__:
        return (
            "takes functions or schedulers, which a config cannot give: a function of your project with the arguments "
            "optimizer and total_updates can build it"
        )
    return ""


def _is_scheduler(item: Any) -> bool:
    """Whether something of torch's module is one of its schedulers."""
    is_public = isinstance(item, type) and issubclass(item, LRScheduler) and not item.__name__.startswith("_")
    return is_public and item is not LRScheduler


def _length(interval: str, updates_per_epoch: int | None) -> int:
    """Return the number of updates in an interval."""
    if interval not in ("update", "epoch"):
        hint = did_you_mean(interval, ("update", "epoch"))
        raise ConfigError(f"there is no '{interval}'. {hint}", path="schedule.interval")
    return _epoch(updates_per_epoch, "schedule.interval") if interval == "epoch" else 1


def _epoch(updates_per_epoch: int | None, path: str) -> int:
    if updates_per_epoch is None:
        raise ConfigError("an epoch of this data has no known length; count in updates", path=path)
    return updates_per_epoch


def warmup_updates(warmup: float | str, total_updates: int, updates_per_epoch: int | None) -> int:
    """Return the length of a warm-up in updates, as it may be written.

    Args:
        warmup: A fraction of the run below 1, a number of updates, or a text such as ``2 epochs``.
        total_updates: Length of the run.
        updates_per_epoch: Length of an epoch; None if it has none.

    Raises:
        ConfigError: It is none of these.
    """
    text = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) (epoch|update)s?", str(warmup))
    if text is not None:
        length = _epoch(updates_per_epoch, "schedule.warmup") if text[2] == "epoch" else 1
        return round(float(text[1]) * length)
    if isinstance(warmup, str) or not 0 <= warmup < math.inf:
        raise ConfigError(
            f"a fraction, a number of updates or a text such as '2 epochs' is needed, not {warmup!r}",
            path="schedule.warmup",
        )
    return round(warmup * total_updates) if warmup < 1 else int(warmup)
