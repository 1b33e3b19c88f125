import gzip
import json
from functools import partial

import pytest
import torch

from callbacks.online_accuracy import OnlineAccuracy
from callbacks.profiler import Profiler
from ksuit_runner.errors import ConfigError

CALLBACKS = {
    "profiler": partial(Profiler, first_update=3, updates=2, record_shapes=True),
    "accuracy": partial(OnlineAccuracy, every_n_updates=2),
}


def traced(run, update):
    """Return how often each phase is in the trace that was logged at an update."""
    (path,) = run.paths.artifacts_dir.glob("files/time/trace/*")
    assert path.name == f"{update:08}.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


def test_the_trace_has_the_updates_and_names_their_phases(new_run):
    run = new_run(CALLBACKS, max_updates=10).train()
    found = traced(run, 4)
    assert found["forward"] == found["backward"] // 2 == found["step"] == 2  # gradients are completed after the pass
    assert found["callback/accuracy"] == 2  # its periodic hook comes after that of the profiler
    (text,) = run.paths.artifacts_dir.glob("texts/time/operators/*.txt")
    assert "aten::addmm" in text.read_text()
    alone = new_run({}, "alone", max_updates=10).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in run.weights.items())


def test_a_run_that_ends_within_them_has_what_was_seen_and_a_resumed_one_the_rest(new_run):
    assert traced(new_run(CALLBACKS, "short", max_updates=3).train(), 3)["step"] == 1
    new_run(CALLBACKS, stop_at=3).train()
    assert not torch.autograd._profiler_enabled()
    assert traced(new_run(CALLBACKS, max_updates=5).train(), 4)["step"] == 1


def test_of_two_at_the_same_time_the_second_one_waits(new_run, caplog):
    callbacks = {
        "profiler": partial(Profiler, first_update=2, updates=1),
        "second": partial(Profiler, first_update=2, updates=2),
    }
    run = new_run(callbacks, max_updates=4).train()
    assert caplog.messages == ["an update is not watched, as another profiler is at work"]
    names = {path.name for path in run.paths.artifacts_dir.glob("files/time/trace/*")}
    assert names == {"00000002.gz", "00000003.gz"}


@pytest.mark.parametrize("argument", ["first_update", "updates", "rows"])
def test_numbers_below_1_are_refused(new_run, argument):
    with pytest.raises(ConfigError, match=f"{argument}: a whole number of at least 1 is needed, not 0"):
        new_run({"profiler": partial(Profiler, **{argument: 0})})
