"""How long training waits for a checkpoint of 400 MB, beside a copy in memory and beside `torch.save`."""

import threading
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch import Tensor

from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.paths import PathProvider

from .measure import Contest, Scale, Spread
from .result import Result, Value

STALL, TOTAL, COPY, SAVE = "stall per checkpoint", "until it is on the disk", "copy in memory", "torch.save"
SECOND = "stall of a second one right after"


def measure(scale: Scale, folder: Path) -> Result:
    size = scale.pick(400_000_000, 400_000)
    state = _state(size)
    result = Result(f"Stall of training per checkpoint, state of {size / 1e6:.0f} MB")
    writer = CheckpointWriter(PathProvider(folder, "run00000"))
    counter = UpdateCounter(1, 1, max_updates=1000)
    peak = _Peak()
    _save(writer, counter, state)  # takes the buffers; the next ones only fill them
    writer.wait()
    growth = peak.stop()
    buffer = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    costs: dict[str, list[float]] = {name: [] for name in (STALL, TOTAL, SECOND, COPY, SAVE)}
    for _ in range(scale.turns(7)):
        _turn(writer, counter, state, buffer, folder, costs)
    writer.close()
    contest = Contest(costs)
    result.add_contest(contest, "ms")
    result.aim("stall / copy in memory", contest.ratio(STALL, COPY), 1.2)
    result.aim("stall / torch.save", contest.ratio(STALL, SAVE), 0.15)
    result.values.append(Value("memory taken", Spread(growth / size, growth / size, growth / size), "x state"))
    return result


def _turn(
    writer: CheckpointWriter,
    counter: UpdateCounter,
    state: Mapping[str, Tensor],
    buffer: Mapping[str, Tensor],
    folder: Path,
    costs: dict[str, list[float]],
) -> None:
    start = perf_counter()
    for name, tensor in state.items():
        buffer[name].copy_(tensor)
    costs[COPY].append(perf_counter() - start)
    start = perf_counter()
    costs[STALL].append(_save(writer, counter, state))
    writer.wait()
    costs[TOTAL].append(perf_counter() - start)
    _save(writer, counter, state)
    costs[SECOND].append(_save(writer, counter, state))
    writer.wait()
    start = perf_counter()
    torch.save(dict(state), folder / "state.pt")
    costs[SAVE].append(perf_counter() - start)


def _state(size: int) -> dict[str, Tensor]:
    """Return weights of a model with 24 layers and its two moments, as Adam keeps them."""
    return {f"layer{i}.{part}": torch.randn(size // (24 * 3 * 4)) for i in range(24) for part in ("w", "m1", "m2")}


def _save(writer: CheckpointWriter, counter: UpdateCounter, state: Mapping[str, Tensor]) -> float:
    """Take a checkpoint, a third of it as the model and the rest as the optimizer's state, as in a run."""
    counter.update += 1
    model = {name: tensor for name, tensor in state.items() if name.endswith("w")}
    others = {name: tensor for name, tensor in state.items() if not name.endswith("w")}
    start = perf_counter()
    writer.save(counter, model, {"trainer": {"optimizer": others}, "callbacks": {}})
    return perf_counter() - start


class _Peak:
    """The most memory that the process takes from now on, beyond what it has now; the page cache is not its own."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._stopped.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)
