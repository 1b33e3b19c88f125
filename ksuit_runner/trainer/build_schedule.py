"""Building the schedule of an optimizer, and following it in a run of another length."""

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ksuit_runner.errors import ConfigError, named_type
from ksuit_runner.schedule import Paced, Schedule, check_scheduler

_METHODS = ("step", "state_dict", "load_state_dict")


def build_schedule(
    factory: Callable[..., Any],
    optimizer: Optimizer,
    total_updates: int,
    updates_per_epoch: int | None = None,
    option: str = "lr",
    path: str = "schedule",
) -> Schedule:
    """Build a schedule that is stepped at every update.

    Args:
        factory: A function or class of (optimizer, total_updates) and, if it asks for it, ``updates_per_epoch``; or one
            of torch's classes with its arguments, in which the text ``total_updates`` stands for the length of the run.
        optimizer: Optimizer whose groups it sets.
        total_updates: Length of the run, in updates.
        updates_per_epoch: Length of an epoch, in updates; None if it has no known length.
        option: Option of the groups that it sets.
        path: Config path of the schedule, for messages.

    Raises:
        ConfigError: It needs what is not there: a metric, functions, other arguments, or an option of the optimizer; or
            it builds something else than a schedule.
    """
    if option not in optimizer.defaults:
        raise ConfigError(f"{type(optimizer).__name__} has no '{option}' that it could set", path=path)
    if option != "lr":
        return Paced(optimizer, lambda groups: _call(factory, groups, total_updates, updates_per_epoch, path), option)
    return _call(factory, optimizer, total_updates, updates_per_epoch, path)


def _call(
    factory: Callable[..., Any], optimizer: Optimizer, total_updates: int, updates_per_epoch: int | None, path: str
) -> Schedule:
    schedule = _construct(factory, optimizer, total_updates, updates_per_epoch, path)
    if lacking := [name for name in _METHODS if not callable(getattr(schedule, name, None))]:
        what = f"it builds {named_type(schedule)}, which has no {lacking[0]}(): a schedule has {', '.join(_METHODS)}"
        raise ConfigError(what, path=path)
    return schedule


def _construct(
    factory: Callable[..., Any], optimizer: Optimizer, total_updates: int, updates_per_epoch: int | None, path: str
) -> Schedule:
    target = getattr(factory, "func", factory)
    asked = inspect.signature(target).parameters
    epoch = {"updates_per_epoch": updates_per_epoch} if "updates_per_epoch" in asked else {}
    if not isinstance(target, type):
        try:
            schedule: Schedule = factory(optimizer, total_updates, **epoch)
        except ConfigError as error:
            error.move("schedule", path)
            raise
        return schedule
    check_scheduler(target, path)
    given = getattr(factory, "keywords", {})
    lengths = {key: total_updates for key, value in given.items() if value == "total_updates"}
    length = {"total_updates": total_updates} if "total_updates" in asked else {}
    try:
        schedule = factory(optimizer, **length, **epoch, **lengths)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{target.__name__}: {error} (as an argument, total_updates stands for the length of the run)", path=path
        ) from error
    return schedule


def follow_new_length(schedule: Schedule) -> None:
    """Set the options to the curve's values, after a state was loaded from a run of another length.

    Schedulers of torch keep the rates of the stored state: they are no closed forms.
    """
    if isinstance(schedule, Paced):
        follow_new_length(schedule.inner)
        schedule.apply()
    elif isinstance(schedule, LambdaLR):
        groups = schedule.optimizer.param_groups
        for group, base, curve in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * curve(schedule.last_epoch)
