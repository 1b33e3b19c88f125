import errno
import json
import os
import resource
import threading
from concurrent.futures import Future, wait
from functools import partial
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint import writer as checkpoint
from ksuit_runner.checkpoint.commit import Committer, InPlace, hand_over
from ksuit_runner.checkpoint.folders import damage, names, read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ConfigError, TakenOverError
from ksuit_runner.paths import PathProvider


class Saves:
    """A writer that is asked to save after every update at which something is due."""

    def __init__(self, folder, **options):
        self.paths = PathProvider(folder, "run00000")
        self.counter = UpdateCounter(6, 2, max_epochs=100)
        self.writer = CheckpointWriter(self.paths, **options)

    def save(self, wait=False, before=lambda: None, size=4):
        state = {"trainer": {"update": self.counter.update}, "callbacks": {}}
        self.writer.save(self.counter, {"w": torch.full((size,), float(self.counter.update))}, state, before, wait)

    def save_at(self, update, **options):
        self.counter.update = update
        self.save(**options)

    def advance(self, updates, tags=None):
        """Do updates; ``tags`` are what a callback asks for after an update."""
        for _ in range(updates):
            self.counter.update += 1
            for tag in (tags or {}).get(self.counter.update, ()):
                self.writer.request(tag)
            if self.writer.is_due(self.counter):
                self.save()
        self.writer.wait(is_last=True)

    def latest(self):
        return self.paths.latest.read_text().strip()

    def kept(self):
        return [name.split("_")[1] for name in reversed(names(self.paths))]


@pytest.fixture
def saves(tmp_path):
    made = []

    def make(**options):
        made.append(Saves(tmp_path, **options))
        return made[-1]

    yield make
    for item in made:
        item.writer.close()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"every_n_updates": 2, "keep_last": 1}, ["U12"]),
        ({"every_n_updates": 2, "keep_last": 3}, ["U8", "U10", "U12"]),
        ({"every_n_epochs": 1}, ["U9", "U12"]),
        ({"every_n_samples": 5, "keep_last": 99}, ["U3", "U5", "U8", "U10"]),
        ({"every_n_updates": 1, "keep_last": 2, "keep_every": 5}, ["U5", "U10", "U11", "U12"]),
        ({"every_n_updates": 4, "keep_last": 1, "keep_every": 1}, ["U4", "U8", "U12"]),
        ({}, []),
    ],
)
def test_what_is_kept(saves, options, kept):
    item = saves(**options)
    item.advance(12)
    assert item.kept() == kept
    assert all(damage(item.paths.checkpoints_dir / name) is None for name in names(item.paths))


def test_a_tagged_checkpoint_is_kept_until_the_tag_moves_on(saves):
    item = saves(every_n_updates=2, keep_last=1)
    item.advance(6, tags={3: ["best"]})
    assert item.kept() == ["U3", "U6"]
    assert read_tags(item.paths) == {"best": "E1_U3_S6"}
    item.advance(2, tags={7: ["best", "other"]})
    assert item.kept() == ["U7", "U8"]
    assert set(read_tags(item.paths).values()) == {"E2_U7_S14"}


def test_tags_lost_by_a_kill_after_the_commit_are_restored(saves):
    item = saves(every_n_updates=1)
    item.advance(3, tags={2: ["old"], 3: ["best"]})
    item.paths.tags.write_text('{"old": "E0_U2_S4"}')
    found = read_newest(item.paths)
    item.writer.restore_tags(str(found.progress), found.tags)
    assert read_tags(item.paths) == {"old": "E0_U2_S4", "best": "E1_U3_S6"}
    before = item.paths.tags.stat()
    item.writer.restore_tags(str(found.progress), found.tags)
    assert item.paths.tags.stat().st_ino == before.st_ino  # nothing to write


def test_a_request_holds_for_one_update(saves):
    item = saves()
    item.advance(4, tags={2: ["best"]})
    assert item.kept() == ["U2"]


def test_latest_names_the_newest(saves):
    item = saves(every_n_updates=1)
    item.advance(5)
    assert item.paths.latest.read_text() == "E1_U5_S10\n"
    assert read_newest(item.paths).model["w"].tolist() == [5.0] * 4


def test_training_may_change_the_weights_while_they_are_written(saves):
    item, weights, gate = saves(), torch.zeros(300_000), threading.Event()
    item.writer.save(item.counter, {"w": weights}, {"trainer": {}, "callbacks": {}}, partial(gate.wait, 10))
    weights.fill_(1)
    assert item.kept() == []
    gate.set()
    item.writer.wait(is_last=True)
    assert not read_newest(item.paths).model["w"].any()


@pytest.mark.parametrize(
    ("took_s", "tiny", "at_once"),
    [
        ([0.009] * 4, 16, [True] * 4),
        ([0.009] * 4, 15, [False] * 4),
        ([0.01] * 4, 16, [True, True, False, False]),
        ([1, 0.009, 1, 1], 16, [True] * 4),
    ],
    ids=["quick", "not tiny", "slow twice", "slow at first"],
)
def test_a_tiny_state_is_written_at_once_as_long_as_the_disk_is_quick(saves, monkeypatch, took_s, tiny, at_once):
    monkeypatch.setattr(checkpoint, "TINY", tiny)
    monkeypatch.setattr(
        checkpoint, "perf_counter", partial(next, chain.from_iterable((100, 100 + end) for end in took_s))
    )
    item, found = saves(), []
    for update in range(1, 5):
        item.save_at(update, before=lambda: found.append(threading.current_thread() is threading.main_thread()))
        assert not at_once[update - 1] or item.kept()[-1] == f"U{update}"
    item.writer.wait(is_last=True)
    assert found == at_once


@pytest.fixture
def behind(saves, monkeypatch):
    """A writer of which 16 bytes are small, and none tiny: everything is written behind training."""
    monkeypatch.setattr(checkpoint, "TINY", 0)
    monkeypatch.setattr(checkpoint, "_SMALL", 16)
    return saves(keep_last=9)


def test_four_small_states_queue_up_while_training_continues(behind):
    gate = threading.Event()
    behind.save_at(1, before=partial(gate.wait, 10))
    for update in range(2, 5):
        behind.save_at(update)
    fifth = threading.Thread(target=partial(behind.save_at, 5))
    fifth.start()
    fifth.join(0.2)
    assert fifth.is_alive() and behind.kept() == []
    gate.set()
    fifth.join(60)
    behind.writer.wait(is_last=True)
    assert behind.kept() == ["U1", "U2", "U3", "U4", "U5"]
    found = [read_newest(behind.paths, name).model["w"][0].item() for name in reversed(names(behind.paths))]
    assert found == [1, 2, 3, 4, 5]


def test_the_next_state_waits_until_a_large_one_is_written(behind):
    small, large = threading.Event(), threading.Event()
    behind.save_at(1, before=partial(small.wait, 10))
    behind.save_at(2, before=partial(large.wait, 10), size=5)
    third = threading.Thread(target=partial(behind.save_at, 3))
    third.start()
    for gate in (small, large):
        third.join(0.1)
        assert third.is_alive()
        gate.set()
    third.join(60)
    assert not third.is_alive()


def test_memory_is_reused(saves, monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint, "HostBuffers", lambda: made.append(HostBuffers()) or made[-1])
    item = saves()
    for update in range(1, 5):
        item.save_at(update, wait=True)
    assert len(made) == 1


def test_only_a_failure_of_the_last_one_is_an_error(behind, caplog):
    def fail():
        raise OSError("no disk")

    behind.save(before=fail)
    behind.save(before=fail)
    with pytest.raises(CheckpointError, match="no disk"):
        behind.writer.wait(is_last=True)
    behind.save(before=fail)
    behind.writer.wait()
    behind.save(before=fail)
    behind.writer.close()
    first, rest = (record.getMessage() for record in caplog.records)
    assert "no disk; the run continues" in first and rest.startswith("2 more checkpoints could not be written to ")


def test_the_writer_ends_its_thread_once_the_queue_is_written(behind):
    before = set(threading.enumerate())
    behind.save()
    (thread,) = set(threading.enumerate()) - before
    behind.writer.close()
    assert not thread.is_alive() and behind.kept() == ["U0"]


@pytest.mark.parametrize("checks", [0, 1, 2], ids=["before it writes", "before the commit", "before it is named"])
def test_a_process_that_was_taken_over_writes_no_names(saves, checks):
    left, synced = [None] * (3 + checks), []

    def check():
        if not left:
            raise TakenOverError("somebody else")
        left.pop()

    item = saves(every_n_updates=1, keep_last=1, check_owner=check)
    item.advance(1)
    with pytest.raises(TakenOverError):
        item.save_at(2, wait=True, before=lambda: synced.append(True))
    assert len(synced) == min(checks, 1)
    assert item.paths.latest.read_text() == "E0_U1_S2\n" and "U1" in item.kept()


def test_a_written_checkpoint_is_announced(saves):
    item, found = saves(every_n_updates=1, keep_last=2), []
    committer = Committer(item.paths, on_committed=lambda: found.append((item.latest(), item.kept())))
    item.writer = CheckpointWriter(item.paths, every_n_updates=1, keep_last=2, hand_over=InPlace(committer))
    item.advance(3)
    assert found == [("E0_U1_S2", ["U1"]), ("E0_U2_S4", ["U1", "U2"]), ("E1_U3_S6", ["U2", "U3"])]


def test_half_written_files_of_a_killed_process_are_removed(saves):
    item = saves(every_n_updates=1)
    folder = item.paths.checkpoints_dir
    (folder / ".E0_U1_S2.tmp").mkdir(parents=True)
    (folder / ".E9_U9_S9.tmp").mkdir()
    (folder / ".latest.tmp").write_text("half")
    item.advance(1)
    assert not list(folder.glob(".*"))


class Recorder:
    """Commits when it is told to, as another process does in its own time."""

    def __init__(self, paths):
        self.committer = Committer(paths)
        self.submitted = {}
        self.hurried, self.is_closed = threading.Event(), False

    def submit(self, name):
        hand_over(self.committer.paths, name)
        self.submitted[name] = Future()
        return self.submitted[name]

    def hurry(self):
        self.hurried.set()

    def restore_tags(self, name, tags):
        self.committer.restore_tags(name, tags)

    def commit(self):
        for name, error in self.committer.commit_waiting().items():
            self.submitted[name].set_exception(error) if error else self.submitted[name].set_result(None)

    def close(self):
        self.is_closed = True


@pytest.fixture
def handed_over(saves, tmp_path):
    recorder = Recorder(PathProvider(tmp_path, "run00000"))
    return saves(hand_over=recorder, keep_last=9), recorder


def hidden(item):
    return sorted(path.name for path in item.paths.checkpoints_dir.glob(".*"))


def test_training_waits_for_no_commit_until_many_are_on_their_way(handed_over, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MOST_ON_THEIR_WAY", 6)
    item, recorder = handed_over
    for update in range(1, 7):
        item.save_at(update)
    wait([saving.written for saving in item.writer._saving])
    assert item.kept() == [] and hidden(item) == [f".{name}.ready" for name in sorted(recorder.submitted)]
    assert not item.paths.tags.exists() and not item.paths.latest.exists() and not recorder.hurried.is_set()
    next_one = threading.Thread(target=partial(item.save_at, 7))
    next_one.start()
    assert recorder.hurried.wait(60)
    next_one.join(0.2)
    assert next_one.is_alive()
    recorder.commit()
    next_one.join(60)
    recorder.commit()
    item.writer.close()
    assert item.kept() == [f"U{update}" for update in range(1, 8)] and hidden(item) == [] and recorder.is_closed


def test_who_waits_for_a_checkpoint_waits_for_no_earlier_one(handed_over, caplog):
    item, recorder = handed_over
    for update in (1, 2, 3):
        item.save_at(update)
    first, second, third = recorder.submitted.values()
    first.set_exception(OSError(errno.EIO, "Input/output error"))
    recorder.hurry = lambda: recorder.submitted["E1_U4_S8"].set_result(None)
    item.save_at(4, wait=True)
    assert recorder.submitted.keys() >= {"E1_U4_S8"} and not second.done()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], "lost, and it works again"
    recorder.hurry = lambda: recorder.submitted["E1_U5_S10"].set_exception(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(CheckpointError, match="Input/output error"):
        item.save_at(5, wait=True)
    assert not second.done() and len(item.writer._saving) == 2
    recorder.hurry = lambda: None
    second.set_exception(OSError(errno.EIO, "Input/output error"))
    closing = threading.Thread(target=item.writer.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive() and not recorder.is_closed
    third.set_result(None)
    closing.join(60)
    assert recorder.is_closed and "1 more checkpoint could not be written" in caplog.records[-1].getMessage()


def test_of_a_checkpoint_that_is_lost_once_the_run_has_ended_no_later_one_is_promised(handed_over, caplog):
    item, recorder = handed_over
    for update in (1, 2):
        item.save_at(update)
    recorder.hurry = lambda: recorder.submitted["E1_U3_S6"].set_result(None)
    item.save_at(3, wait=True)
    recorder.submitted["E0_U1_S2"].set_exception(OSError(errno.EIO, "Input/output error"))
    recorder.submitted["E0_U2_S4"].set_result(None)
    item.writer.close()
    folder = item.writer.path_provider.checkpoints_dir
    assert [record.getMessage() for record in caplog.records] == [
        f"the checkpoint could not be written to {folder}: [Errno 5] Input/output error",
        f"checkpoints can be written again: {folder}",
    ]


def test_files_are_handed_over_without_waiting_for_the_disk(handed_over, monkeypatch):
    item, recorder = handed_over
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("it waits for the disk"))
    item.save_at(1)
    item.save_at(2)
    monkeypatch.undo()
    recorder.commit()
    assert item.kept() == ["U1", "U2"]


def test_the_same_position_is_written_again_when_its_commit_is_done(handed_over, monkeypatch):
    item, recorder = handed_over
    item.save_at(1)
    again = threading.Thread(target=partial(item.save_at, 1))
    again.start()
    again.join(0.2)
    assert again.is_alive() and len(recorder.submitted) == 1
    recorder.commit()
    again.join(60)
    recorder.commit()
    assert not again.is_alive() and item.kept() == ["U1"] and hidden(item) == []


def test_nobody_waits_for_a_commit_once_the_run_is_taken_over(handed_over, monkeypatch):
    item, recorder = handed_over
    monkeypatch.setattr(checkpoint, "TINY", 0)  # in a thread
    item.save_at(1)

    def refuse():
        raise TakenOverError("another process has resumed the run")

    monkeypatch.setattr(checkpoint, "_OWNER_S", 0.01)
    item.writer.check_owner = refuse
    with pytest.raises(TakenOverError):
        item.writer.close()
    assert recorder.is_closed
    assert not any(thread.name.startswith("checkpoint-writer") for thread in threading.enumerate())


def test_an_error_of_a_commit_elsewhere_is_one_of_the_checkpoint(handed_over, caplog):
    item, recorder = handed_over
    item.save_at(1)
    recorder.submitted["E0_U1_S2"].set_exception(OSError(errno.EIO, "Input/output error"))
    item.save_at(2)
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "tries again at the next interval" in record.message
    recorder.submitted["E0_U2_S4"].set_exception(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="No space left") as error:
        item.writer.wait(is_last=True)
    assert error.value.__cause__.errno == errno.ENOSPC


def test_the_last_checkpoint_is_written_again_while_the_recorder_finds_no_room(handed_over, monkeypatch, caplog):
    item, recorder = handed_over
    monkeypatch.setattr(checkpoint, "_ROOM_POLL_S", 0)
    results = [OSError(errno.ENOSPC, "No space left on device"), None]

    def submit(name):
        hand_over(item.paths, name)
        done, error = Future(), results.pop(0)
        done.set_exception(error) if error else done.set_result(recorder.committer.commit(name))
        return done

    recorder.submit = submit
    item.save_at(1, wait=True)
    assert item.kept() == ["U1"] and results == [] and "waits for room" in caplog.text


def test_what_cannot_be_removed_is_left(saves):
    item = saves(every_n_updates=1, keep_last=1)
    item.advance(1)
    (item.paths.checkpoints_dir / "E0_U0_S0").write_text("a file")
    item.advance(2)
    assert item.kept() == ["U0", "U3"]


def test_invalid_tags_are_ignored(saves):
    item = saves(every_n_updates=1)
    item.advance(1)
    for text in ("", "[]", "null", json.dumps({"number": 1, "list": [], "gone": "E9_U9_S9"})):
        item.paths.tags.write_text(text)
        assert read_tags(item.paths) == {}
    item.paths.tags.write_text(json.dumps({"number": 1, "best": "E0_U1_S2"}))
    assert read_tags(item.paths) == {"best": "E0_U1_S2"}


def test_tensors_of_callbacks_get_their_own_files(saves, bits):
    item, average = saves(), torch.zeros(3)
    item.writer.add_tensors("ema", lambda: {"w": average})
    average.fill_(2)
    item.save(wait=True)
    folder = read_newest(item.paths).paths.checkpoint_dir
    assert bits(load_file(folder / "ema.safetensors")) == bits({"w": torch.full((3,), 2.0)})
    assert list(load_file(folder / "model.safetensors")) == ["w"]


@pytest.mark.parametrize("name", ["ema", "model", "trainer"])
def test_a_file_has_one_owner(saves, name):
    item = saves()
    item.writer.add_tensors("ema", dict)
    with pytest.raises(ConfigError, match=f"'{name}.safetensors'"):
        item.writer.add_tensors(name, dict)


def test_tied_weights_are_written(saves):
    item, weight = saves(), torch.arange(4.0)
    item.writer.save(item.counter, {"a": weight, "b": weight}, {"trainer": {}, "callbacks": {}}, wait=True)
    assert read_newest(item.paths).model["b"].tolist() == [0, 1, 2, 3]


def test_weights_alone_can_be_saved_and_read(saves):
    saver = saves(every_n_updates=1)
    saver.writer.save(saver.counter, {"w": torch.ones(2)}, {}, wait=True)
    found = read_newest(saver.paths)
    assert torch.equal(found.model["w"], torch.ones(2))
    assert (found.state["trainer"], found.state["callbacks"]) == ({}, {})


def test_a_damaged_position_is_written_again(saves):
    item = saves(every_n_updates=1, keep_last=2)
    item.advance(3)
    (item.paths.checkpoints_dir / "E1_U3_S6" / "model.safetensors").write_bytes(b"")
    item.counter.update = 2
    item.advance(1)
    assert str(read_newest(item.paths).progress) == "E1_U3_S6"
    assert item.kept() == ["U2", "U3"]


def test_a_later_damaged_checkpoint_does_not_push_out_a_good_one(saves):
    item = saves(every_n_updates=1, keep_last=2)
    item.advance(3)
    for name in ("E1_U3_S6", "E0_U2_S4"):
        (item.paths.checkpoints_dir / name / "trainer.json").unlink()
    item.counter.update = 1
    item.advance(1)
    assert str(read_newest(item.paths).progress) == "E0_U2_S4"


@pytest.mark.parametrize("option", [{"keep_last": 0}, {"keep_every": 0}, {"every_n_updates": 0}])
def test_numbers_are_positive(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}.* 0"):
        CheckpointWriter(PathProvider(tmp_path, "run00000"), **option)


class Disk(CallbackBase):
    """Has room for files up to a size, by update: the system's limit on that stands for a full disk, and is real."""

    def __init__(self, room, **kwargs):
        super().__init__(**kwargs)
        self.room = room

    def _before_every_update(self, update_counter):
        self.checkpoint_writer.wait()
        if update_counter.update in self.room:
            limit_files(self.room[update_counter.update])


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def on_a_full_disk(maker):
    """Train for 8 updates with a checkpoint after every second one, with room as {update: largest file}."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    def train_there(room):
        model = nn.Sequential(nn.Linear(4, 5000), nn.Linear(5000, 3))
        run = maker.run(
            {"disk": (Disk, {"room": room})}, checkpoint={"every_n_updates": 2, "keep_last": 9}, model=model
        )
        try:
            train(run)
        finally:
            limit_files(before)
            assert run.counter.update == 8

    return train_there


@pytest.mark.parametrize("largest", [20_000, 300_000], ids=["weights do not fit", "optimizer state does not fit"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(on_a_full_disk, maker, caplog, largest):
    on_a_full_disk({2: largest, 4: -1})
    lost, again = (record.message for record in caplog.records if record.levelname in ("ERROR", "WARNING"))
    assert "tries again at the next interval" in lost and again.startswith("checkpoints can be written again: ")
    assert sorted(path.name for path in maker.paths().checkpoints_dir.iterdir()) == [
        "E0_U2_S12", "E2_U6_S36", "E2_U8_S48", "latest", "tags.json",
    ]  # fmt: skip
    assert read_newest(maker.paths()).progress.update == 8


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(on_a_full_disk, maker):
    folder = maker.paths().checkpoints_dir
    with pytest.raises(CheckpointError, match=f"^the checkpoint could not be written to {folder}"):
        on_a_full_disk({6: 300_000})
    assert read_newest(maker.paths()).progress.update == 6
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
