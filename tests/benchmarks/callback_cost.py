"""What a callback costs per update: with no hook there, with one that uses no random numbers, with one that may."""

from functools import partial
from pathlib import Path
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng

from .driver import NO_CALLBACKS, drive
from .measure import Scale, compete
from .result import Result


class Idle(CallbackBase):
    """Implements no hook that fires per update."""

    def _before_training(self, update_counter: UpdateCounter) -> None: ...


class Busy(CallbackBase):
    """Implements one that does nothing."""

    @uses_no_rng
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None: ...


class Keyed(CallbackBase):
    """Implements one that might draw, for which the generators are seeded."""

    def _track_after_update_step(self, update_counter: UpdateCounter) -> None: ...


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Cost per callback and update")
    many, updates = scale.pick(100, 5), scale.pick(880, 20)
    names = {"0": ("Idle", 0), "10 idle": ("Idle", 10)}
    names |= {f"{many} {kind.lower()}": (kind, many) for kind in ("Idle", "Busy", "Keyed")}
    contest = compete({name: partial(_train, folder, updates, *of) for name, of in names.items()}, scale.turns(9))
    result.add_contest(contest, "us")
    costs = {kind: contest.difference(f"{many} {kind}", "0").scaled(1e6 / many) for kind in ("idle", "busy", "keyed")}
    result.aim("per callback with one hook per update", costs.pop("busy"), 2.0, "us")
    for kind, cost in costs.items():
        result.notes.append(f"per {kind} callback: {cost.median:.3f} us ({cost.low:.3f} to {cost.high:.3f})")
    return result


def _train(folder: Path, updates: int, kind: str, count: int) -> float:
    targets: dict[str, Any] = {f"callbacks.cb{i}": {"_target_": f"{__name__}.{kind}"} for i in range(count)}
    length = (f"trainer.max_updates={updates}", "tracker=noop", "model=linear", "data.batch_size=32")
    return drive(folder, *NO_CALLBACKS, *length, more=targets).bare
