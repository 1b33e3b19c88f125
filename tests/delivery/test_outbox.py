"""What is delivered to a tracker, and what stays for the next time."""

import json

import pytest

from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.delivered import Delivery, RunState, read_state
from ksuit_runner.delivery.outbox import Outbox, load_or_ask
from ksuit_runner.delivery.registration import index_registered
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import now
from ksuit_runner.record.stored_run import entries
from ksuit_runner.tracker.base import KIND_TAG, RUN_ID_TAG, START_TAG, DatasetInfo, EndStatus, RunInfo
from ksuit_runner.tracker.noop import NoopTracker

DIGITS, MORE = (DatasetInfo(name, "training", "c0ffee", "here") for name in ("digits", "more"))


class Recorder(NoopTracker):
    """Keeps what is delivered to it, in its order."""

    def __init__(self, known=()):
        super().__init__()
        self.delivered, self.known = [], list(known)

    def log_params(self, params):
        self.delivered.append(("params", params))

    def log_inputs(self, inputs):
        self.delivered.append(("inputs", inputs))

    def set_tags(self, tags, run_id=None):
        self.delivered.append(("tags", tags, run_id))

    def find(self, query):
        return self.known


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


def full_box(**changes):
    return Outbox(
        "run00000",
        "mine",
        **{
            **{"tracker_id": "t1", "start_time": 7, "parent_run_id": "parent00", "start_tags": {"author": "me"}},
            **{"params": {"lr": "1"}, "tags": {"a": "1"}, "inputs": [DIGITS], "other_tags": {"other000": {"b": "2"}}},
            **{"status": EndStatus.FAILED, "end_time": 9, **changes},
        },
    )


def test_everything_is_read_as_it_was_stored(paths):
    assert Outbox.load(paths) is read_state(paths) is None
    for box in (full_box(), full_box(version=(1 << 53) - 1)):
        assert box.store(paths)
        assert Outbox.load(paths) == box
        assert read_state(paths) == RunState(box, Delivery("t1"))
    delivery = Delivery("t2", 3, EndStatus.FAILED, 9)
    delivery.store(paths)
    assert read_state(paths) == RunState(box, delivery)
    Delivery().store(paths)  # the tracker has lost it since
    assert read_state(paths).tracker_id is None


@pytest.mark.parametrize("text", ["", "[]", '{"tracker_id": "../x"}', '{"version": -1}', '{"status": "RUNNING"}'])
def test_without_a_usable_note_nothing_is_delivered(paths, text):
    full_box().store(paths)
    Delivery("t2", 3).store(paths)
    paths.delivered.write_text(text)
    assert read_state(paths).delivery == Delivery("t1")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"inputs": [1]}', '{"inputs": [], "run_id": "a", "name": "b", "more": 1}', "\udcff"]
)
def test_a_damaged_file_is_an_error_that_says_so(paths, text):
    full_box().store(paths)
    paths.outbox.write_text(text, errors="surrogateescape")
    with pytest.raises(TrackerError, match=r"tracker\.json is damaged"):
        Outbox.load(paths)


def test_a_full_disk_ends_no_run(paths, caplog):
    paths.runs_dir.mkdir(parents=True)
    paths.run_dir.write_text("a file where the folder should be")
    assert not full_box().store(paths)
    Delivery("t1").store(paths)
    assert caplog.text.count("run run00000 could not be written") == 1
    assert "what the tracker of run run00000 has could not be written" in caplog.text


def test_all_messages_are_delivered_and_nothing_else():
    box, tracker = full_box(other_tags={"other000": {"b": "2"}, "unknown0": {"c": "3"}}), Recorder()
    box.deliver(tracker, {"other000": "t2"}.get)
    assert tracker.delivered == [
        *[("params", {"lr": "1"}), ("inputs", [DIGITS]), ("tags", {"a": "1"}, None)],
        ("tags", {"b": "2"}, "t2"),
    ]
    tracker = Recorder()
    Outbox("run00000", "mine").deliver(tracker, lambda run_id: run_id)
    assert tracker.delivered == []


def test_what_is_there_stays_and_what_is_new_is_added():
    box = full_box()
    box.add_params({"lr": "other", "decay": "2"})
    box.add_tags({"a": "other", "c": "3"}, "run00000")
    box.add_tags({"b": "other"}, "other000")
    box.add_inputs([DIGITS, MORE])
    assert box.version == 4
    assert (box.params, box.tags) == ({"lr": "1", "decay": "2"}, {"a": "other", "c": "3"})
    assert (box.inputs, box.other_tags) == ([DIGITS, MORE], {"other000": {"b": "other"}})


def test_tags_that_a_page_shows_in_one_text_are_sent_together():
    shown = {"ksuit.command": "train", "ksuit.notes": "first"}
    box = Outbox("run00000", "mine", start_tags={**shown, "a": "1"})
    box.add_tags({"b": "2"}, "run00000")
    assert box.tags == {"b": "2"}
    box.add_tags({"ksuit.notes": "later"}, "run00000")
    assert box.tags == {"b": "2", "ksuit.command": "train", "ksuit.notes": "later"}
    box.add_tags({"ksuit.description": "best: 3"}, "run00000")
    assert box.tags == {"b": "2", **shown, "ksuit.notes": "later", "ksuit.description": "best: 3"}


@pytest.mark.parametrize(
    "add",
    [
        *(lambda box: box.add_params({"b": "1"}), lambda box: box.add_inputs([MORE])),
        *(lambda box: box.add_tags({"b": "1"}, "run00000"), lambda box: box.add_tags({"b": "1"}, "other000")),
    ],
)
def test_whatever_is_added_is_a_message(add):
    state = RunState(full_box(version=3), Delivery("t1", 3))
    assert not state.has_messages
    add(state.box)
    assert state.has_messages


def test_a_run_that_is_not_registered_is_a_message_with_all_that_was_delivered():
    state = RunState(full_box(version=3), Delivery(None, 3))
    assert state.has_messages and state.has_end
    tags = {"author": "me", START_TAG: "run00000", RUN_ID_TAG: "run00000"}
    assert state.box.registration_tags() == tags
    assert full_box(start_tags={START_TAG: "before"}).registration_tags()[START_TAG] == "before"


def _binding(paths):
    return Binding(Recorder(), paths, lambda: None)


def test_an_end_is_due_until_it_is_delivered():
    for status, end_time, delivered, has_end in [
        *((None, None, (None, None), False), (None, None, ("FINISHED", 9), False)),
        *(("FINISHED", 9, (None, None), True), ("FINISHED", 9, ("FINISHED", 9), False)),
        *(("FINISHED", 9, ("FINISHED", 8), True), ("KILLED", None, ("FINISHED", 8), True)),
    ]:
        box = full_box(status=status and EndStatus(status), end_time=end_time)
        delivery = Delivery("t1", 0, delivered[0] and EndStatus(delivered[0]), delivered[1])
        assert RunState(box, delivery).has_end is has_end


def test_who_holds_the_lock_of_a_dead_run_says_that_it_was_killed(paths):
    for status in (EndStatus.FINISHED, None):
        full_box(status=status).store(paths)
        _binding(paths).mark_if_killed({"ksuit.exit": "SIGKILL"})
        box = Outbox.load(paths)
        assert box.status is (status or EndStatus.KILLED)
        assert (box.version, box.tags.get("ksuit.exit")) == ((0, None) if status else (1, "SIGKILL"))


@pytest.mark.parametrize(
    ("points", "begun", "end_time"),
    [
        ([(1, 20), (2, 30)], {}, 30),
        ([(1, 20), (2, 30), (1, 900), (2, 901)], {}, 30),  # of an evaluation of either checkpoint
        ([], {}, 7),
        ([(1, 20)], {"resume_time": 50}, 50),
        ([(1, 2)], {}, 7),  # a fork has copied it
        ([(1, -5)], {"start_time": None}, 0),
        ([], {"start_time": None}, None),
    ],
)
def test_a_killed_run_ended_at_its_last_sign_of_life_whoever_notices_when(paths, points, begun, end_time):
    paths.run_dir.mkdir(parents=True)
    journal = Journal(paths.journal)
    for step, timestamp in points:
        journal.append(step, {"loss": 1.0}, timestamp)
    journal.close()
    alive = full_box(status=None, end_time=None, **begun)
    for seen, expected in ((None, end_time), (99, 99)):
        alive.store(paths)
        _binding(paths).mark_if_killed(end_time=seen)
        assert Outbox.load(paths).end_time == expected
    alive.store(paths)
    box = Outbox.load(paths)
    box.resume(paths)
    assert box.ran_ms == (0 if end_time is None else alive.ran_until(end_time) or 0)


@pytest.mark.parametrize("damage", [lambda path: path.symlink_to(path.parent), lambda path: path.write_text("{}")])
def test_a_killed_run_with_a_damaged_journal_ended_at_its_start(paths, damage):
    full_box(status=None, end_time=None).store(paths)
    damage(paths.journal)
    _binding(paths).mark_if_killed()
    assert (Outbox.load(paths).status, Outbox.load(paths).end_time) == (EndStatus.KILLED, 7)


def test_a_journal_from_the_future_says_at_most_now(paths):
    full_box(status=None, end_time=None).store(paths)
    Journal(paths.journal).append(1, {"loss": 1.0}, (1 << 63) - 1)
    _binding(paths).mark_if_killed()
    assert 7 < Outbox.load(paths).end_time <= now()


def test_the_tracker_is_asked_about_a_run_without_a_file(paths):
    def info(status):
        return RunInfo("t1", "theirs", status, start_time=7)

    long = PathProvider(paths.output_dir, "run00000111")
    assert load_or_ask(long, Recorder()) == Outbox("run00000111", "run00000", "run00000111")
    for status in EndStatus:
        box = load_or_ask(paths, Recorder([info(status.value)]))
        assert box == Outbox("run00000", "theirs", "t1", 7, status=status)
    assert load_or_ask(paths, Recorder([info("RUNNING")])) == Outbox("run00000", "theirs", "t1", 7)
    full_box().store(paths)
    assert load_or_ask(paths, Recorder([info("RUNNING")])) == full_box()


def test_a_run_that_was_registered_later_is_found_by_its_new_id(paths):
    paths.run_dir.mkdir(parents=True)
    index_registered(paths, full_box(start_tags={KIND_TAG: "sweep"}), "t2")
    assert entries(paths) == []
    index_registered(paths, full_box(start_time=7000, start_tags={KIND_TAG: "fork"}), "t2")
    index_registered(paths, full_box(start_time=None), "t3")
    found = [(entry.run_id, entry.name, entry.mode, entry.start_time, entry.tracker_id) for entry in entries(paths)]
    assert found == [("run00000", "mine", "fork", 7.0, "t2"), ("run00000", "mine", "train", 0.0, "t3")]


def test_what_another_run_left_is_not_taken_for_its_own(tmp_path, paths):
    full_box().store(paths)
    other = PathProvider(tmp_path, "other000")
    other.run_dir.mkdir()
    paths.outbox.rename(other.outbox)
    with pytest.raises(TrackerError, match="belongs to run run00000"):
        Outbox.load(other)


WRONG = {
    **{"name": 1, "tracker_id": "../t", "start_time": -1, "parent_run_id": 7, "start_tags": {"a": 1}, "params": []},
    **{"tags": {"a": None}, "inputs": [{"name": "a"}], "other_tags": {"../x": {}}, "version": True},
    **{"status": "RUNNING", "end_time": 0.5},
}


@pytest.mark.parametrize("key", WRONG)
def test_every_value_is_checked(paths, key):
    full_box().store(paths)
    stored = json.loads(paths.outbox.read_text())
    paths.outbox.write_text(json.dumps({**stored, key: WRONG[key]}))
    with pytest.raises(TrackerError, match=rf"schema: .*at .*\$\.{key}"):
        Outbox.load(paths)
