"""What a callback costs per update: any with a hook or without, those that are on by default, and each that ships."""

from functools import partial
from pathlib import Path
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.phases import CALLBACK
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.record.journal import JournalReader

from .driver import NO_CALLBACKS, drive
from .measure import Scale, Spread, compete
from .result import Result
from .small_model import OVERRIDES

SHIPPED = (
    *("debug=all_callbacks", "model.hidden_dims=[128]", "data.batch_size=32", "callbacks.early_stop.patience=1000"),
    *("callbacks.times.every_n_updates=null", "+callbacks.times.every_n_epochs=1"),
)
"""Every callback that ships; what evaluates does so once an epoch, which has 40 updates."""
_TIME = f"time/{CALLBACK}"


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
    _measure_default(result, scale, folder)
    _measure_shipped(result, scale, folder)
    return result


def _measure_default(result: Result, scale: Scale, folder: Path) -> None:
    """Measure what the callbacks that are on by default add to an update of the small model."""
    length = (f"trainer.max_epochs={scale.pick(20, 1)}", "tracker=noop", "callbacks=[]", "checkpoint=at_end")
    task = [item for item in OVERRIDES if not item.startswith(("default_callbacks", "callbacks"))]
    chosen = {"none": [*task, "default_callbacks=none"], "default": [*OVERRIDES]}
    contest = compete(
        {name: partial(_computed, folder, *given, *length) for name, given in chosen.items()}, scale.turns(9)
    )
    result.aim("the default callbacks together", contest.difference("default", "none").scaled(1e6), 15.0, "us")


def _computed(folder: Path, *overrides: str) -> float:
    return drive(folder, *overrides).computed


def _measure_shipped(result: Result, scale: Scale, folder: Path) -> None:
    """Measure the hooks of each callback that ships in one run of all of them: the mean of each epoch but the first."""
    driven = drive(folder, *SHIPPED, f"trainer.max_epochs={scale.pick(4, 2)}")
    times: dict[str, list[float]] = {}
    for line, _ in JournalReader(driven.paths.journal).read():
        for point in line:
            if point.key.startswith(_TIME):
                times.setdefault(point.key.removeprefix(_TIME), []).append(point.value)
    for name, seconds in sorted(times.items(), key=lambda item: -Spread.of(item[1]).median):
        result.add(name, Spread.of(seconds[1:]), "us")


def _train(folder: Path, updates: int, kind: str, count: int) -> float:
    targets: dict[str, Any] = {f"callbacks.cb{i}": {"_target_": f"{__name__}.{kind}"} for i in range(count)}
    length = (f"trainer.max_updates={updates}", "tracker=noop", "model=linear", "data.batch_size=32")
    return drive(folder, *NO_CALLBACKS, *length, more=targets).computed
