"""The messages between the training process and the recorder."""

import errno
import math
from multiprocessing import Pipe
from pathlib import Path

import pytest

from ksuit_runner.errors import ConfigError, LostRunError, TrackerError
from ksuit_runner.record.point import Point
from ksuit_runner.recorder.protocol import (
    Answer,
    Channel,
    ClosedError,
    Failure,
    RemoteError,
    Request,
    UnsendableError,
    pack,
    unpack,
    unpack_result,
)
from ksuit_runner.tracker.base import BaseTracker, DatasetInfo, RunInfo


@pytest.fixture
def ends():
    first, second = map(Channel, Pipe())
    yield first, second
    first.close()
    second.close()


def crossed(ends, message):
    ends[0].send(message)
    return ends[1].receive(10)


def test_arguments_arrive_as_what_they_were(ends):
    points = [Point("loss/train", value, 1 << 40, 1) for value in (0.1, math.nan, math.inf, -0.0)]
    sent = pack(BaseTracker.log_points, [points], {})
    received = unpack(BaseTracker.log_points, crossed(ends, Request(1, 2, "log_points", sent)).arguments)
    assert repr(received) == repr({"points": points})
    datasets = [DatasetInfo("train", "training", "ab", "Digits", "{}")]
    sent = pack(BaseTracker.log_inputs, (), {"datasets": datasets})
    assert unpack(BaseTracker.log_inputs, crossed(ends, Request(1, 2, "log_inputs", sent)).arguments) == {
        "datasets": datasets
    }
    sent = pack(BaseTracker.upload, (Path("/a/b"), "b"), {})
    received = unpack(BaseTracker.upload, crossed(ends, Request(1, 2, "upload", sent)).arguments)
    assert received == {"path": Path("/a/b"), "artifact_path": "b"}


def test_results_arrive_as_what_they_were(ends):
    info = RunInfo("ab12", "name", "RUNNING", {"key": "value"}, None, 5)
    assert unpack_result(BaseTracker.find, crossed(ends, Answer(1, [info])).value) == [info]
    assert unpack_result(BaseTracker.last_steps, crossed(ends, Answer(1, {"loss": 3})).value) == {"loss": 3}


def test_what_is_no_text_arrives_as_what_it_was(ends):
    path, number = Path("/a\udce9/b"), 1 << 60
    sent = pack(BaseTracker.upload, (path, "b\udcff"), {})
    received = unpack(BaseTracker.upload, crossed(ends, Request(number, 2, "upload", sent)).arguments)
    assert received == {"path": path, "artifact_path": "b\udcff"}
    points = [Point("\udce9", value, 1 << 40, 1) for value in (0.1, math.nan, math.inf, -0.0)]
    sent = pack(BaseTracker.log_points, [points], {})
    received = unpack(BaseTracker.log_points, crossed(ends, Request(1, 2, "log_points", sent)).arguments)
    assert repr(received) == repr({"points": points})
    failed = crossed(ends, Answer(1, error=Failure.of(ConfigError("no \udce9", path="tracker")))).error.error()
    assert (type(failed), str(failed), failed.path) == (ConfigError, "tracker: no \udce9", "tracker")


@pytest.mark.parametrize("value", [object(), 1 << 70, [[{1, object()}]]])
def test_what_no_message_can_hold_is_refused(ends, value):
    with pytest.raises(UnsendableError):
        ends[0].send(Answer(1, value))
    assert crossed(ends, Answer(1)).number == 1


def test_a_result_of_another_type_is_refused_with_the_name_of_its_method():
    with pytest.raises(TrackerError, match=r"tracker's start_run has returned is refused: Expected .*null"):
        unpack_result(BaseTracker.start_run, None)


def test_errors_arrive_as_what_they_were(ends):
    def raised(error):
        return crossed(ends, Answer(1, error=Failure.of(error))).error.error()

    config = raised(ConfigError("'lr' is unknown", path="tracker.lr"))
    assert (type(config), str(config), config.path) == (ConfigError, "tracker.lr: 'lr' is unknown", "tracker.lr")
    assert type(raised(LostRunError("gone"))) is LostRunError
    full = raised(OSError(errno.ENOSPC, "No space left", "/a"))
    assert (full.errno, full.strerror, full.filename) == (errno.ENOSPC, "No space left", "/a")
    try:
        {}["key"]
    except KeyError as error:
        unknown = raised(error)
    assert type(unknown) is RemoteError
    assert "KeyError: 'key'" in str(unknown)
    assert '{}["key"]' in str(unknown), "its traceback"


def test_a_closed_end_is_noticed(ends):
    ends[1].close()
    with pytest.raises(ClosedError):
        ends[0].receive()
    with pytest.raises(ClosedError):
        ends[0].send(Request(1, 1, "where", {}))


def test_a_wait_for_a_message_ends(ends):
    assert ends[0].receive(0.01) is None
