from functools import partial
from pathlib import Path

import pytest
import torch

from callbacks.memory_snapshot import MemorySnapshot
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError


@pytest.fixture
def calls(monkeypatch):
    """Let the run look like one on a GPU: what torch is asked to record there."""
    calls = []
    monkeypatch.setattr(MemorySnapshot, "trainer", OnGpu(), raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text(f"{len(calls)}"))
    return calls


class OnGpu:
    """The trainer of a callback, as if on another device."""

    def __get__(self, callback, owner):
        return self

    def __set__(self, callback, value):
        pass

    device = torch.device("cuda", 0)


class Failing(CallbackBase):
    def _after_update(self, update_counter):
        if update_counter.update == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")


def logged(run):
    return {path.name: path.read_text() for path in run.paths.artifacts_dir.glob("files/memory/*")}


def test_it_records_some_updates_and_stops(new_run, calls):
    run = new_run({"memory": partial(MemorySnapshot, first_update=2, updates=2)}, max_updates=9).train()
    assert calls == [{"max_entries": 100_000}, {"enabled": None}]
    assert logged(run) == {"00000003.pickle": "1"}
    alone = new_run({}, "alone", max_updates=9).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in run.weights.items())


def test_a_full_memory_is_logged_before_the_run_fails(new_run, calls):
    run = new_run({"memory": partial(MemorySnapshot, first_update=2, updates=5), "fails": Failing})
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert logged(run) == {"00000003.pickle": "1"}
    assert calls[-1] == {"enabled": None}


def test_mistakes_are_found_before_training(new_run, calls):
    with pytest.raises(ConfigError, match="max_entries: a whole number of at least 1 is needed, not 0"):
        new_run({"memory": partial(MemorySnapshot, max_entries=0)})


def test_a_run_on_the_cpu_has_none(new_run):
    with pytest.raises(ConfigError, match="torch records the memory of CUDA devices, and this run is on 'cpu'"):
        new_run({"memory": MemorySnapshot})
