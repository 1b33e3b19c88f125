"""A callback that notes when training began, when its last update was done, and when that was on the disk."""

import json
import time
from pathlib import Path
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class Clock(CallbackBase):
    """Writes `clock.json` into the run's folder; between the first and the last update it costs nothing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._noted: dict[str, float] = {}
        self._first_update = 0

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._noted = {"began": time.time(), "start": time.perf_counter(), "computed": -time.thread_time()}
        self._first_update = update_counter.update

    def _after_training(self, update_counter: UpdateCounter) -> None:
        self._noted["trained"] = time.perf_counter()
        self._noted["computed"] += time.thread_time()

    def close(self) -> None:
        """Note the end: by now the last checkpoint is written."""
        if not self.trainer.strategy.world.records:
            return
        stop = time.perf_counter()
        updates = self.trainer.counter.update - self._first_update
        path = self.path_provider.run_dir / "clock.json"
        noted = {**self._noted, "stop": stop, "updates": updates, "at": self.trainer.counter.update}
        path.write_text(json.dumps(noted))


def bare_seconds(folder: Path) -> float:
    """Return the seconds per update of the last run in an output folder, until the last one was done and logged."""
    noted = json.loads(max(folder.glob("runs/*/clock.json"), key=lambda path: path.stat().st_mtime).read_text())
    return float((noted["trained"] - noted["start"]) / noted["updates"])
