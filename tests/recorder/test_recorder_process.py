"""The recorder as a process: its start, its end, its deaths, and what it takes over from the training process."""

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from unittest import mock

import psutil
import pytest

from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.checkpoint.format import pack_state, write_partial
from ksuit_runner.config.factory import Factory
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import ConfigError, KsuitError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import now
from ksuit_runner.recorder import client, life
from ksuit_runner.recorder import tracker as tracker_module
from ksuit_runner.recorder.client import RecorderClient
from ksuit_runner.recorder.protocol import RemoteError
from ksuit_runner.recorder.recorded_run import RecordedRun
from ksuit_runner.recorder.remote import RemoteRecording
from ksuit_runner.recorder.session import Opening
from ksuit_runner.recorder.tracker import RemoteTracker, open_tracker, recorder, warm_up
from ksuit_runner.system.recorder_lock import RecorderLock
from ksuit_runner.system.run_lock import RunLock, is_held
from ksuit_runner.tracker import mlflow_store

TRACKER = """
    import logging
    import os
    import time
    from pathlib import Path
    from ksuit_runner.errors import TrackerError
    from ksuit_runner.tracker.noop import NoopTracker

    class OwnTracker(NoopTracker):
        def __init__(self, note=""):
            super().__init__()
            self.note, self.keys = note, []

        def where(self):
            return f"{os.getpid()} {self.note} {os.environ.get('COLOUR')} {Path.cwd()}"

        def list_artifacts(self, path="", run_id=None):
            Path(path).touch()
            time.sleep(60)

        def check_key(self, key):
            if key == "die":
                print("these are my last words", flush=True)
                os._exit(1)
            if key == "once" and not self.keys:
                return self.keys.append(key)
            if key.startswith("log"):
                return logging.getLogger("ksuit_runner.own").info(key)
            if key.startswith("print"):
                print(key, flush=True)
            raise ValueError(key)

        def history(self, key, run_id=None):
            return [object()]

        def start_run(self, name, tags, parent_run_id=None, start_time=None):
            times = Path("times")
            is_first = not times.exists()
            with times.open("a") as file:
                file.write(f"{start_time}\\n")
            if name == "dies once" and is_first:
                os._exit(1)
            return super().start_run(name, tags, parent_run_id, start_time)

        def end_run(self, status, end_time=None):
            raise TrackerError(f"run {self.run_id} cannot end")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "own_tracker.py").write_text(textwrap.dedent(TRACKER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(params=["process", "thread"])
def any_recorder(request):
    recorder = RecorderClient(in_place=request.param == "thread")
    yield recorder
    end(recorder)


@pytest.fixture
def process():
    recorder = RecorderClient()
    yield recorder
    end(recorder)


def end(recorder):
    """End a recorder that may have runs which nobody has closed: by itself it would wait for this process's death."""
    recorder._is_shut_down = True
    if recorder._life is not None and recorder._life._process is not None:
        recorder._life._process.kill()
    recorder.shut_down()


def opened(recorder, project, **arguments):
    opening = Opening({"_target_": "own_tracker.OwnTracker", **arguments}, str(project / "outputs"))
    return RemoteTracker(recorder, recorder.open(opening))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of(tracker):
    return int(tracker.where().split()[0])


def test_calls_are_made_by_the_recorder(any_recorder, project):
    tracker = opened(any_recorder, project, note="hello")
    pid, note = tracker.where().split()[:2]
    assert note == "hello"
    assert (int(pid) == os.getpid()) is any_recorder.in_place
    info = tracker.start_run("name", {"key": "value"})
    assert tracker.run == info
    assert info.name == "name"
    assert tracker.artifacts_are_local is True
    assert (tracker.require, tracker.close_timeout_s) == (True, 10.0)
    with pytest.raises(TrackerError, match=f"^run {info.run_id} cannot end$"):
        tracker.end_run("FINISHED")
    with pytest.raises(RemoteError, match="ValueError: loss"):
        tracker.check_key("loss")


def test_a_name_is_checked_once_for_all_runs_that_are_recorded_alike(tmp_path, monkeypatch):
    asked = []

    def call(self, session, method, arguments, *given, call=RecorderClient.call):
        asked.extend([arguments["key"]] if method == "check_key" else [])
        return call(self, session, method, arguments, *given)

    monkeypatch.setattr(RecorderClient, "call", call)
    config = {"_target_": "ksuit_runner.tracker.mlflow.MlflowTracker"}
    for folder in ("one", "one", "two"):
        tracker = open_tracker(Factory({"tracker": config}), OutputPaths(tmp_path / folder))
        tracker.check_key("loss")
        with pytest.raises(ConfigError, match="MLflow"):
            tracker.check_key(300 * "x")
    assert asked == ["loss", 300 * "x", 300 * "x", "loss", 300 * "x"]


def test_only_the_first_of_many_trackers_that_are_alike_waits_until_it_is_built(project, monkeypatch):
    asked = []
    monkeypatch.setattr(
        RecorderClient,
        "describe",
        lambda self, session, describe=RecorderClient.describe: asked.append(session) or describe(self, session),
    )

    def described(**config):
        tracker = open_tracker(Factory({"tracker": config}), OutputPaths(project))
        return tracker.require, tracker.close_timeout_s, tracker.has_registry, tracker.may_be_away

    ours = {"_target_": "ksuit_runner.tracker.mlflow.MlflowTracker"}
    for count in (1, 1, 1):
        assert described(**ours, close_timeout_s=7.0) == (True, 7.0, True, False) and len(asked) == count
    assert described(**ours, close_timeout_s=8.0, require=False)[:2] == (False, 8.0) and len(asked) == 2
    for count in (3, 4):
        with pytest.raises(ConfigError, match="^tracker"):
            described(**ours, notte="hello")
        assert len(asked) == count
    for count in (5, 6):
        described(_target_="own_tracker.OwnTracker")
        assert len(asked) == count


def test_a_tracker_of_the_user_is_asked_each_time(project):
    tracker = open_tracker(Factory({"tracker": {"_target_": "own_tracker.OwnTracker"}}), OutputPaths(project))
    tracker.check_key("once")
    with pytest.raises(RemoteError, match="ValueError: once"):
        tracker.check_key("once")


def test_sessions_have_trackers_of_their_own(process, project):
    first, second = opened(process, project, note="first"), opened(process, project, note="second")
    first.start_run("one", {})
    second.start_run("two", {})
    assert first.where().split()[:2] == [str(pid_of(second)), "first"]
    assert first.run_id != second.run_id


def test_the_session_of_a_tracker_that_is_no_longer_used_is_closed(process, project):
    used = opened(process, project, note="used")
    threads = psutil.Process(pid_of(used)).num_threads()
    for _ in range(20):
        opened(process, project).where()
    wait_for(lambda: psutil.Process(pid_of(used)).num_threads() <= threads + 2)
    assert used.where().split()[1] == "used"


def test_a_run_that_is_closed_is_left_alone(project, monkeypatch):
    def release(lock, release=RecorderLock.release):
        time.sleep(0.3)
        release(lock)

    monkeypatch.setattr(RecorderLock, "release", release)
    recorder = RecorderClient(in_place=True)
    paths = PathProvider(project / "outputs", "run00000")
    with RunLock(paths.lock) as lock:
        recording = RemoteRecording(opened(recorder, project), paths, lock)
        assert paths.recorder_lock.exists()
        recording.close()
        assert not paths.recorder_lock.exists()
    recorder.shut_down()


def test_a_config_that_does_not_fit_is_an_error_here(process, project):
    with pytest.raises(ConfigError, match="^tracker"):
        opened(process, project, notte="hello")
    gc.collect()  # the error's traceback held it
    opened(process, project)
    assert len(process._sessions) == 1, "a tracker that could not be built keeps its session"


def test_an_answer_that_cannot_be_sent_is_an_error_and_no_wait_for_ever(any_recorder, project):
    tracker = opened(any_recorder, project)
    with pytest.raises(TrackerError, match="tracker's history has returned is refused: .* of type object"):
        tracker.history("loss")
    assert tracker.where()


def test_surroundings_need_not_be_text(process, project, monkeypatch, tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLOUR", "gr\udcfcn")
    assert opened(process, project).where().split()[-2:] == ["gr\udcfcn", str(folder)]


def test_the_recorder_takes_over_the_present_surroundings(process, project, monkeypatch, tmp_path):
    monkeypatch.setenv("COLOUR", "red")
    pid = pid_of(opened(process, project))
    monkeypatch.setenv("COLOUR", "blue")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    tracker = opened(process, project, note="-")
    assert tracker.where() == f"{pid} - blue {tmp_path / 'below'}"
    monkeypatch.delenv("COLOUR")
    assert opened(process, project).where().split()[1] == "None"


def test_mlflow_is_imported_without_pandas_unless_a_tracker_is_the_users(process, project):
    opening = Opening({"_target_": "ksuit_runner.tracker.mlflow.MlflowTracker"}, str(project / "outputs"))
    assert opening.is_shipped
    assert not Opening({"_target_": "own_tracker.OwnTracker"}, "").is_shipped
    tracker = RemoteTracker(process, process.open(opening))
    tracker.start_run("name", {})
    mapped = " ".join(area.path for area in psutil.Process(process._life._process.pid).memory_maps())
    assert "sqlalchemy" in mapped
    assert "pandas" not in mapped
    assert "pyarrow" not in mapped


def test_a_recorder_that_dies_is_started_again_and_bound_to_the_run(process, project):
    tracker = opened(process, project, note="again")
    run = tracker.start_run(None, {})
    before = pid_of(tracker)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(TrackerError, match=run.run_id):  # of the tracker that is bound to it
        tracker.end_run("FINISHED")
    assert pid_of(tracker) != before
    assert tracker.where().split()[1] == "again"


def test_a_request_is_repeated_when_the_recorder_dies_meanwhile(process, project):
    tracker = opened(process, project)
    before, begun = pid_of(tracker), project / "begun"

    def call():
        with suppress(TrackerError):
            tracker.list_artifacts(str(begun))

    caller = threading.Thread(target=call)
    caller.start()
    wait_for(begun.exists)
    begun.unlink()
    os.kill(before, signal.SIGKILL)
    wait_for(begun.exists)
    process.shut_down()
    caller.join(10)
    assert not caller.is_alive()


def test_a_run_that_is_begun_twice_has_a_time_by_which_the_first_one_is_found(process, project):
    times, tracker = project / "times", opened(process, project)
    before = now()
    tracker.start_run("dies once", {})
    first, second = times.read_text().split()
    assert first == "None" and before <= int(second) <= now()
    times.unlink()
    tracker.start_run("dies once", {}, start_time=5)
    assert times.read_text().split() == ["5", "5"]


def test_a_recorder_that_dies_each_time_is_an_error_with_its_last_words(process, project):
    tracker = opened(process, project)
    with pytest.raises(TrackerError, match=r"has died 4 times.*\nthese are my last words"):
        tracker.check_key("die")
    assert tracker.where()


def test_what_no_recorder_can_say_any_more_may_be_behind(any_recorder, project):
    tracker = opened(any_recorder, project)
    assert not tracker.is_behind
    any_recorder.shut_down()
    assert tracker.is_behind


def test_it_runs_in_this_process_where_no_other_can_be_started(project, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(life, "start_detached", refuse)
    recorder = RecorderClient()
    with caplog.at_level(logging.WARNING):
        tracker = opened(recorder, project)
    assert pid_of(tracker) == os.getpid()
    assert "no process can be started for the recorder" in caplog.text
    recorder.shut_down()


def test_it_runs_in_this_process_where_that_is_part_of_another_program(project, monkeypatch):
    monkeypatch.setattr(sys, "executable", None)
    recorder = RecorderClient()
    assert pid_of(opened(recorder, project)) == os.getpid()
    recorder.shut_down()


def test_it_starts_without_folders_and_with_paths_that_are_no_text(process, project, monkeypatch, tmp_path):
    removed = tmp_path / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(removed))
    monkeypatch.setattr(sys, "path", ["", *sys.path, tmp_path])
    assert pid_of(opened(process, project)) != os.getpid()


def test_a_death_is_noticed_though_a_child_keeps_the_channel_open(process, project, monkeypatch):
    monkeypatch.setattr(life, "_PING_S", 0.1)
    kept = []

    def pipe():
        ends = Pipe()
        kept.append(os.dup(ends[1].fileno()))
        return ends

    monkeypatch.setattr(life, "Pipe", pipe)
    tracker = opened(process, project)
    before = pid_of(tracker)
    os.kill(before, signal.SIGKILL)
    assert pid_of(tracker) != before
    for descriptor in kept:
        os.close(descriptor)


def test_a_recorder_that_has_nothing_to_do_lives_on(process, project, monkeypatch):
    tracker = opened(process, project)
    before = pid_of(tracker)
    monkeypatch.setattr(life, "_PING_S", 0.1)
    monkeypatch.setattr(life, "_HANGS_S", 3.0)
    tracker.where()  # from here on it is asked for signs of life
    time.sleep(4)
    assert pid_of(tracker) == before


def test_what_it_prints_does_not_fill_the_disk(process, project, monkeypatch):
    monkeypatch.setattr(life, "_MOST_OUTPUT", 1000)
    tracker = opened(process, project)
    for _ in range(20):
        with pytest.raises(RemoteError):
            tracker.check_key("print " + 1000 * "x")
    assert os.fstat(process._life._output.fileno()).st_size <= 2100
    with pytest.raises(TrackerError, match="\nthese are my last words$"):
        tracker.check_key("die")


def test_what_it_logs_is_logged_here(process, project, caplog):
    with caplog.at_level(logging.INFO):
        opened(process, project).check_key("log 100 %s")
    assert ("ksuit_runner.own", logging.INFO, "log 100 %s") in caplog.record_tuples


class Checkpoints:
    """Notes what becomes of the recorder of a run."""

    def __init__(self):
        self.seen = []

    def recorder_died(self):
        self.seen.append("died")

    def recorder_restarted(self):
        self.seen.append("restarted")

    def recorder_given_up(self):
        self.seen.append("given up")


@pytest.mark.parametrize("why", ["its lock is damaged", "no descriptor is left"])
def test_a_run_that_a_new_recorder_cannot_follow_is_given_up(process, project, monkeypatch, caplog, why):
    paths, checkpoints = PathProvider(project / "outputs", "run00000"), Checkpoints()
    tracker = opened(process, project)
    with RunLock(paths.lock) as lock:
        process.record(tracker.session, "run00000", lock.token, checkpoints)
        process.start(tracker.session)
        assert process.follows(tracker.session)
        if why == "its lock is damaged":
            paths.recorder_lock.unlink()
            paths.recorder_lock.mkdir()
        else:
            full = OSError(errno.EMFILE, "Too many open files")
            monkeypatch.setattr(life, "Pipe", mock.Mock(side_effect=full))
        os.kill(process._life._process.pid, signal.SIGKILL)
        wait_for(lambda: "given up" in checkpoints.seen)
        assert checkpoints.seen == ["died", "given up"]
        assert not process.follows(tracker.session)
        assert "Training continues" in caplog.text
        monkeypatch.setattr(life, "Pipe", Pipe)
        if paths.recorder_lock.is_dir():
            paths.recorder_lock.rmdir()
        assert tracker.where(), "a query starts it again"
        assert not is_held(paths.recorder_lock), "it does what the training process does by itself now"
        process.record(tracker.session, "run00000", lock.token, checkpoints)
        process.start(tracker.session)
        assert is_held(paths.recorder_lock)


@pytest.mark.parametrize("what", ["record", "start"])
def test_a_run_that_cannot_be_recorded_is_not_recorded_by_the_next_recorder_either(process, project, what):
    paths, tracker = PathProvider(project / "outputs", "run00000"), opened(process, project)
    replaced = paths.checkpoints_dir / ".E1_U1_S1.old"
    with RunLock(paths.lock) as lock:
        if what == "record":
            paths.recorder_lock.mkdir(parents=True)
        else:
            replaced.mkdir(parents=True)  # cannot be moved back
            replaced.with_name("E1_U1_S1").symlink_to("nothing")
            process.record(tracker.session, "run00000", lock.token, Checkpoints())
        with pytest.raises((KsuitError, OSError)):
            process.record(tracker.session, "run00000", lock.token, Checkpoints())
            process.start(tracker.session)
        assert not process.follows(tracker.session)
        if what == "record":
            paths.recorder_lock.rmdir()
        replaced.with_name("E1_U1_S1").unlink(missing_ok=True)
        os.kill(process._life._process.pid, signal.SIGKILL)
        assert tracker.where(), "a query starts it again"
        assert not is_held(paths.recorder_lock)


def followed(process, project, lock, checkpoints):
    """Have a run followed that has nothing to record, and return its tracker."""
    tracker = opened(process, project)
    process.record(tracker.session, "run00000", lock.token, checkpoints)
    process.start(tracker.session)
    return tracker


def test_a_recorder_that_dies_now_and_then_is_started_again_each_time(process, project, monkeypatch, caplog):
    monkeypatch.setattr(client, "_DEATHS_S", 0.0)
    paths, checkpoints = PathProvider(project / "outputs", "run00000"), Checkpoints()
    with RunLock(paths.lock) as lock:
        tracker = followed(process, project, lock, checkpoints)
        for count in range(1, 5):
            life = process._life
            os.kill(life._process.pid, signal.SIGKILL)
            wait_for(lambda: len(checkpoints.seen) == 2 * count)  # noqa: B023
            assert process._life is not life and process.follows(tracker.session)
    assert checkpoints.seen == 4 * ["died", "restarted"]
    assert "Training continues" not in caplog.text


def test_a_recorder_that_dies_too_often_records_the_run_no_more_until_it_is_told_to_again(process, project):
    paths, checkpoints = PathProvider(project / "outputs", "run00000"), Checkpoints()
    with RunLock(paths.lock) as lock:
        tracker = followed(process, project, lock, checkpoints)
        for count in (2, 4, 5):
            os.kill(process._life._process.pid, signal.SIGKILL)
            wait_for(lambda: len(checkpoints.seen) == count)  # noqa: B023
        assert checkpoints.seen == [*2 * ["died", "restarted"], "given up"]
        assert not process.follows(tracker.session)
        assert tracker.where(), "a query starts it again"
        assert not is_held(paths.recorder_lock)
        process.record(tracker.session, "run00000", lock.token, checkpoints)
        process.start(tracker.session)
        os.kill(process._life._process.pid, signal.SIGKILL)
        wait_for(lambda: len(checkpoints.seen) == 7)
        assert checkpoints.seen[5:] == ["died", "restarted"], "earlier deaths count no more"


def test_a_recorder_that_dies_while_it_starts_to_follow_has_finished_nothing(process, project, monkeypatch):
    started = []

    def start(*given, start=life._start_process):
        started.append(start(*given))
        if len(started) == 1:
            os.kill(started[0].pid, signal.SIGSTOP)
        return started[-1]

    checkpoints = Checkpoints()
    with RunLock(PathProvider(project / "outputs", "run00000").lock) as lock:
        followed(process, project, lock, checkpoints)
        monkeypatch.setattr(life, "_start_process", start)
        os.kill(process._life._process.pid, signal.SIGKILL)
        wait_for(lambda: process._life._process in started)
        os.kill(started[0].pid, signal.SIGKILL)
        wait_for(lambda: "restarted" in checkpoints.seen)
        assert checkpoints.seen == ["died", "died", "restarted"]


def test_a_run_whose_process_lives_on_is_not_killed_by_the_end_of_its_channel(process, project):
    paths = PathProvider(project / "outputs", "run00000")
    with RunLock(paths.lock) as lock:
        Outbox("run00000", "name").store(paths)
        followed(process, project, lock, Checkpoints())
        process._life._channel.close()
        time.sleep(1)
        assert process._life._process.poll() is None, "it waits for the death of the process"
        assert Outbox.load(paths).status is None and paths.lock.exists()


def test_a_recorder_that_hangs_does_not_keep_a_run_from_being_closed(process, project, monkeypatch):
    monkeypatch.setattr(client, "_EXIT_S", 0.1)
    paths = PathProvider(project / "outputs", "run00000")
    with RunLock(paths.lock) as lock:
        tracker = followed(process, project, lock, Checkpoints())
        os.kill(process._life._process.pid, signal.SIGSTOP)
        closing = threading.Thread(target=process.close_run, args=(tracker.session,), daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


def test_news_reach_the_recorder_at_once_and_those_that_come_meanwhile_as_one(project, monkeypatch):
    recorder, seen, looked = RecorderClient(in_place=True), [], threading.Semaphore(0)
    monkeypatch.setattr(RecordedRun, "notify", lambda run: seen.append("news") or looked.acquire(timeout=30))
    monkeypatch.setattr(RecordedRun, "hurry", lambda run: seen.append("hurry"))
    with RunLock(PathProvider(project / "outputs", "run00000").lock) as lock:
        tracker = followed(recorder, project, lock, Checkpoints())
        recorder.notify(tracker.session)
        wait_for(lambda: seen == ["news"])
        for _ in range(3):
            recorder.notify(tracker.session)
        recorder.hurry(tracker.session)
        looked.release(2)
        wait_for(lambda: len(seen) == 3)
        assert sorted(seen) == ["hurry", "news", "news"]
        looked.release(2)
        wait_for(lambda: not recorder._sessions[tracker.session].is_notified)
        recorder.notify(tracker.session)
        wait_for(lambda: len(seen) == 4)
        recorder.close_run(tracker.session)
        recorder.notify(tracker.session)
        recorder.hurry(tracker.session)
        assert tracker.where() and len(seen) == 4, "of a run that is followed no more there are no news"
    recorder.shut_down()


@pytest.mark.parametrize("last", ["record", "start"])
def test_the_successor_of_a_recorder_that_dies_right_after_an_answer_records(process, project, monkeypatch, last):
    def call(session, method, arguments, call=process.call):
        answer = call(session, method, arguments)
        if method == last:
            life = process._life
            life._process.kill()
            wait_for(lambda: life.is_over)
        return answer

    tracker, paths, name = opened(process, project), PathProvider(project / "outputs", "run00000"), "E1_U1_S1"
    monkeypatch.setattr(process, "call", call)
    with RunLock(paths.lock) as lock:
        recording = RemoteRecording(tracker, paths, lock)
        recording.start()
        write_partial(paths.checkpoints_dir / name, pack_state({"model": {}}, {}), "hash", 1)
        recording.checkpoints.submit(name).result(30)
        assert is_held(paths.recorder_lock)


def test_tags_are_restored_by_the_recorder(any_recorder, project):
    paths, name = PathProvider(project / "outputs", "run00000"), "E1_U1_S1"
    with RunLock(paths.lock) as lock:
        recording = RemoteRecording(opened(any_recorder, project), paths, lock)
        recording.start()
        write_partial(paths.checkpoints_dir / name, pack_state({"model": {}}, {}), "hash", 1)
        recording.checkpoints.submit(name).result(30)
        recording.checkpoints.restore_tags(name, ["best"])
        assert read_tags(paths) == {"best": name}
        recording.close()


def test_a_session_that_was_opened_ahead_is_used_or_closed(project, monkeypatch):
    process, outputs = RecorderClient(in_place=True), OutputPaths(project / "outputs")
    monkeypatch.setattr(tracker_module, "_recorders", {False: process})
    first, other = (Factory({"tracker": {"_target_": "own_tracker.OwnTracker", "note": note}}) for note in "ab")
    warm_up(first, outputs)
    used = open_tracker(first, outputs)
    warm_up(first, outputs)
    other = open_tracker(other, outputs)
    assert [each.where().split()[1] for each in (used, other)] == ["a", "b"]
    assert process._sessions.keys() == {used.session, other.session}
    process.shut_down()


def test_what_cannot_be_done_ahead_is_done_when_it_is_needed(tmp_path, monkeypatch):
    process, outputs, asked = RecorderClient(in_place=True), OutputPaths(tmp_path / "outputs"), []
    monkeypatch.setattr(tracker_module, "_recorders", {True: process})
    monkeypatch.setattr(mlflow_store, "make_blank", lambda paths: asked.append(paths) or 1 / 0)
    factory = Factory({"tracker": {"_target_": "ksuit_runner.tracker.mlflow.MlflowTracker"}})
    warm_up(factory, outputs)
    tracker = open_tracker(factory, outputs)
    run_id = tracker.start_run("cold", {}).run_id
    assert [run.run_id for run in tracker.find("cold")] == [run_id]
    assert len(asked) == 1
    process.shut_down()


def test_a_tracker_that_was_edited_has_a_new_recorder_and_one_in_use_keeps_its_own(project, monkeypatch):
    monkeypatch.setattr(tracker_module, "_recorders", {})
    factory, outputs = Factory({"tracker": {"_target_": "own_tracker.OwnTracker"}}), OutputPaths(project / "outputs")
    used = open_tracker(factory, outputs)
    first = pid_of(used)
    assert pid_of(open_tracker(factory, outputs)) == first
    for color in ("red", "blue"):
        (project / "own_tracker.py").write_text(textwrap.dedent(TRACKER).replace("COLOUR", color))
        monkeypatch.setenv(color, color)
        edited = open_tracker(factory, outputs)
        assert edited.where().split()[1] == color and pid_of(edited) != first, "as it was edited last"
    assert used.where().split()[:2] == [str(first), "None"], "as it was when it was built"
    end(used.client)
    end(edited.client)


EDITED = """
    from pathlib import Path
    import psutil
    from ksuit_runner import run

    WRITES = (
        "from pathlib import Path\\nfrom ksuit_runner.tracker.noop import NoopTracker\\n\\n\\n"
        "class Writes(NoopTracker):\\n    def log_points(self, points):\\n        Path('told').write_text({!r})\\n"
    )
    Path("writes.py").write_text(WRITES.format("one"))
    for edited in (None, "two"):
        if edited:
            Path("writes.py").write_text(WRITES.format(edited))
        run(["model=linear", "callbacks=[]", "trainer.max_epochs=1", "tracker=writes"])
        print("told:", Path("told").read_text(), len(psutil.Process().children(recursive=True)))
"""


def test_a_run_that_is_started_after_an_edit_of_its_tracker_uses_what_was_edited(tmp_path):
    (tmp_path / "edits.py").write_text(textwrap.dedent(EDITED))
    (tmp_path / "conf" / "tracker").mkdir(parents=True)
    (tmp_path / "conf" / "tracker" / "writes.yaml").write_text("_target_: writes.Writes\n")
    result = subprocess.run([sys.executable, "edits.py"], cwd=tmp_path, capture_output=True, text=True)
    told = [line for line in result.stdout.splitlines() if line.startswith("told:")]
    assert told == ["told: one 1", "told: two 1"], result.stdout + result.stderr


def test_a_forked_child_has_a_recorder_of_its_own():
    ours = recorder()
    if (child := os.fork()) == 0:
        os._exit(recorder() is ours)
    assert os.waitpid(child, 0)[1] == 0
    assert recorder() is ours
    assert recorder(is_shipped=False) is not ours, "it may have imported MLflow without what the user's tracker needs"


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


SCRIPT = """
    import os, sys, time
    from ksuit_runner.recorder.client import RecorderClient
    from ksuit_runner.recorder.session import Opening
    from ksuit_runner.recorder.tracker import RemoteTracker

    recorder = RecorderClient()
    target = "ksuit_runner.tracker.mlflow.MlflowTracker"
    session = recorder.open(Opening({"_target_": target}, "outputs"))
    tracker = RemoteTracker(recorder, session)
    tracker.find("nothing")
    print(recorder._life._process.pid, {"mlflow", "sqlalchemy"} & sys.modules.keys(), flush=True)
    END
"""


@pytest.mark.parametrize("how", ["exit", "killed", "killed_with_children"])
def test_it_ends_with_the_training_process(project, how):
    end = {
        "exit": "",
        "killed": "os.kill(os.getpid(), 9)",
        "killed_with_children": "os.fork() or time.sleep(60); os.kill(os.getppid(), 9); time.sleep(60)",
    }[how]
    if how == "killed_with_children":  # the child that stays has this process's end of the channel
        end = "child = os.fork()\nif child:\n    print(child, flush=True)\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    script = textwrap.dedent(SCRIPT).replace("END", end)
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=project)
    pid, imported = started.stdout.readline().split(maxsplit=1)
    child = int(started.stdout.readline()) if how == "killed_with_children" else None
    started.wait(30)
    try:
        assert imported == "set()\n", "what only the recorder should import"
        wait_for(lambda: has_ended(int(pid)), seconds=5)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        started.stdout.close()


def test_signals_to_the_group_do_not_end_it(process, project):
    tracker = opened(process, project)
    pid = pid_of(tracker)
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C does not reach it"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    assert pid_of(tracker) == pid


def test_it_imports_no_torch(process, tmp_path):
    Path(tmp_path / "seeing.py").write_text(
        "import sys\nfrom ksuit_runner.tracker.mlflow import MlflowTracker\n"
        "class Seeing(MlflowTracker):\n    def where(self):\n        return str('torch' in sys.modules)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        factory = Factory({"tracker": {"_target_": "seeing.Seeing"}})
        tracker = RemoteTracker(
            process, process.open(Opening(factory.node("tracker"), str(OutputPaths(tmp_path).output_dir)))
        )
        tracker.start_run(None, {})
        assert tracker.where() == "False"
    finally:
        sys.path.remove(str(tmp_path))
