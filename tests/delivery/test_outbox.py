"""What is delivered to a tracker, and what stays for the next time."""

import json

import pytest

from ksuit_runner.delivery.outbox import Messages, Outbox, index_registered, load_or_ask
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
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
            **{"status": EndStatus.FAILED, "end_time": 9, "is_end_delivered": True, **changes},
        },
    )


def test_everything_is_read_as_it_was_stored_under_the_keys_of_the_first_version(paths):
    assert Outbox.load(paths) is None
    for box in (full_box(), full_box(version=(1 << 53) - 1)):
        box.store(paths)
        assert Outbox.load(paths) == box
    stored = json.loads(paths.outbox.read_text())
    assert (stored["told_version"], stored["is_end_told"], stored["status"]) == (0, True, "FAILED")


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
    full_box().store(paths)
    assert "run run00000 could not be written" in caplog.text


def test_all_messages_are_delivered_and_nothing_else():
    box, tracker = full_box(other_tags={"other000": {"b": "2"}, "unknown0": {"c": "3"}}), Recorder()
    box.messages().deliver(tracker, {"other000": "t2"}.get)
    assert tracker.delivered == [
        *[("params", {"lr": "1"}), ("inputs", [DIGITS]), ("tags", {"a": "1"}, None)],
        ("tags", {"b": "2"}, "t2"),
    ]
    tracker = Recorder()
    Messages(0, {}, {}, [], {}).deliver(tracker, lambda run_id: run_id)
    assert tracker.delivered == []


def test_what_changes_during_a_delivery_is_delivered_by_the_next_one():
    box = full_box()
    messages = box.messages()
    box.add_params({"lr": "other", "decay": "2"})
    box.add_tags({"a": "other", "c": "3"}, "run00000")
    box.add_tags({"b": "other"}, "other000")
    box.add_inputs([DIGITS, MORE])
    assert box.version == messages.version + 4
    assert (messages.params, messages.tags, messages.inputs) == ({"lr": "1"}, {"a": "1"}, [DIGITS])
    assert messages.other_tags == {"other000": {"b": "2"}}
    assert (box.params, box.tags) == ({"lr": "1", "decay": "2"}, {"a": "other", "c": "3"})
    assert (box.inputs, box.other_tags) == ([DIGITS, MORE], {"other000": {"b": "other"}})
    box.delivered_version = messages.version
    assert box.has_messages
    box.delivered_version = box.messages().version
    assert not box.has_messages


@pytest.mark.parametrize(
    "add",
    [
        *(lambda box: box.add_params({"b": "1"}), lambda box: box.add_inputs([MORE])),
        *(lambda box: box.add_tags({"b": "1"}, "run00000"), lambda box: box.add_tags({"b": "1"}, "other000")),
    ],
)
def test_whatever_is_added_is_a_message(add):
    box = full_box()
    assert not box.has_messages
    add(box)
    assert box.has_messages


def test_a_run_that_is_not_registered_is_a_message_with_all_that_was_delivered():
    box = full_box(version=3, delivered_version=3)
    box.forget_registration()
    assert box.has_messages and (box.tracker_id, box.delivered_version, box.is_end_delivered) == (None, 0, False)
    assert box.start_tags["author"] == "me" and box.start_tags[RUN_ID_TAG] == "run00000"
    box.delivered_version = box.version
    assert box.has_messages and box.has_end
    start = box.start_tags[START_TAG]
    box.forget_registration()
    assert box.start_tags[START_TAG] == start


def test_an_end_is_due_until_it_is_delivered():
    ends = [
        full_box(status=status, is_end_delivered=is_delivered).has_end
        for status in (None, EndStatus.FINISHED)
        for is_delivered in (0, 1)
    ]
    assert ends == [False, False, True, False]
    assert Outbox("run00000", "mine", status=EndStatus.FINISHED).has_end


def test_the_tracker_is_asked_about_a_run_without_a_file(paths):
    def info(status):
        return RunInfo("t1", "theirs", status, start_time=7)

    long = PathProvider(paths.output_dir, "run00000111")
    assert load_or_ask(long, Recorder()) == Outbox("run00000111", "run00000", "run00000111")
    for status in EndStatus:
        box = load_or_ask(paths, Recorder([info(status.value)]))
        assert box == Outbox("run00000", "theirs", "t1", 7, status=status, is_end_delivered=True)
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
    **{"told_version": 1 << 53, "status": "RUNNING", "end_time": 0.5, "is_end_told": 1},
}


@pytest.mark.parametrize("key", WRONG)
def test_every_value_is_checked(paths, key):
    full_box().store(paths)
    stored = json.loads(paths.outbox.read_text())
    paths.outbox.write_text(json.dumps({**stored, key: WRONG[key]}))
    with pytest.raises(TrackerError, match=rf"schema: .*at .*\$\.{key}"):
        Outbox.load(paths)


def test_what_an_earlier_version_left_is_still_delivered(paths):
    full_box().store(paths)
    stored = json.loads(paths.outbox.read_text())
    kept = {key: value for key, value in stored.items() if key not in ("version", "told_version")}
    paths.outbox.write_text(json.dumps(kept))
    assert Outbox.load(paths).has_messages
    paths.outbox.write_text('{"run_id": "run00000", "name": "mine"}')
    assert Outbox.load(paths) == Outbox("run00000", "mine", version=1)
