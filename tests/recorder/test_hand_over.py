"""The training process commits checkpoints itself only once its recorder is given up."""

import errno
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from stored_checkpoint import hand_over_checkpoint

from ksuit_runner.checkpoint import commit as commit_module
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import PARTIAL, READY, names, read_tags
from ksuit_runner.checkpoint.format import pack_state, write_partial
from ksuit_runner.paths import PathProvider
from ksuit_runner.recorder.remote import RemoteHandOver
from ksuit_runner.system.run_lock import RunLock


class DeadRecorder:
    """A client whose recorder has died, which is not noticed yet."""

    def notify(self, session):
        pass


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


def test_the_tag_that_a_dying_recorder_was_writing_is_kept(tmp_path, monkeypatch):
    paths = PathProvider(tmp_path, "run00000")
    content = pack_state({"model": {"w": torch.ones(3)}}, {"callbacks": {}})
    tagged, newer = "E1_U1_S1", "E2_U2_S2"
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        hand_over_checkpoint(paths, tagged, content, keep_last=1, tags=["best"])
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(commit_module, "write_text", killed)
            Committer(paths).commit(tagged)
        write_partial(paths.checkpoints_dir / newer, content, "hash", 1)
        done = hand_over.submit(newer)
        assert names(paths) == [tagged] and not done.done()
        hand_over.recorder_given_up()
        assert done.done() and names(paths) == [newer, tagged] and read_tags(paths) == {"best": tagged}


def test_what_a_dying_recorder_has_dropped_for_a_newer_one_that_still_waits_is_no_failure(tmp_path, monkeypatch):
    paths, content = PathProvider(tmp_path, "run00000"), pack_state({"model": {"w": torch.ones(3)}}, {})
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        for name in ("E1_U1_S1", "E2_U2_S2"):
            write_partial(paths.checkpoints_dir / name, content, "hash", 1, is_packed=True)
        older, newer = hand_over.submit("E1_U1_S1"), hand_over.submit("E2_U2_S2")
        # On a full disk it drops the older one to make room, and is killed before it commits the newer one.
        errors = iter([OSError(errno.ENOSPC, "No space left on device"), Killed()])

        def fail(*_):
            raise next(errors)

        monkeypatch.setattr(commit_module, "sync", fail)
        with pytest.raises(Killed):
            Committer(paths).commit_waiting(hand_over.ended)
        assert not older.done() and not (paths.checkpoints_dir / ".E1_U1_S1.ready").exists()
        hand_over.recorder_died()
        hand_over.recorder_restarted()
        assert older.done() and older.exception() is None and not newer.done()


def test_what_a_dying_recorder_had_still_to_drop_is_dropped_by_the_next_one(tmp_path, monkeypatch):
    paths, content = PathProvider(tmp_path, "run00000"), pack_state({"model": {"w": torch.ones(3)}}, {})
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        *old, newest = [f"E{update}_U{update}_S{update}" for update in range(1, 6)]
        for name in (*old, newest):
            write_partial(paths.checkpoints_dir / name, content, "hash", 2, is_packed=True)
        ends = [hand_over.submit(name) for name in (*old, newest)]
        with monkeypatch.context() as patch, pytest.raises(Killed):
            drops = iter([drop := commit_module._drop, drop, killed])  # after the two that are committed
            patch.setattr(commit_module, "_drop", lambda folder: next(drops)(folder))
            Committer(paths).commit_waiting(hand_over.ended)
        assert all(end.done() and not end.exception() for end in ends), "training waits for none of it"
        assert names(paths) == [newest, old[-1]] and paths.latest.read_text() == f"{newest}\n"
        Committer(paths).recover()
        assert {path.name for path in paths.checkpoints_dir.iterdir()} == {newest, old[-1], "latest", "tags.json"}
        assert paths.latest.read_text() == f"{newest}\n"


def test_a_checkpoint_that_is_committed_at_once_by_a_recorder_that_then_dies_is_done(tmp_path, monkeypatch):
    paths, name = PathProvider(tmp_path, "run00000"), "E1_U1_S1"
    write_partial(paths.checkpoints_dir / name, pack_state({"model": {"w": torch.ones(3)}}, {}), "hash", 1)

    def lives_and_dies():
        Committer(paths).commit(name)
        hand_over.recorder_died()
        hand_over.recorder_restarted()

    recorder = threading.Thread(target=lives_and_dies)

    def rename(path, target, rename=Path.rename):
        rename(path, target)
        if path.suffix == PARTIAL:
            recorder.start()
            recorder.join(0.2)

    monkeypatch.setattr(Path, "rename", rename)
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        assert hand_over.submit(name).result(10) is None
    recorder.join(10)
    assert names(paths) == [name]


@pytest.fixture
def no_descriptor_is_left():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("is_given_up", [False, True])
def test_nobody_waits_for_a_checkpoint_that_cannot_be_looked_for(tmp_path, no_descriptor_is_left, is_given_up):
    paths, committed, waiting = PathProvider(tmp_path, "run00000"), "E1_U1_S1", "E2_U2_S2"
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        for name in (committed, waiting):
            write_partial(paths.checkpoints_dir / name, pack_state({"model": {"w": torch.ones(3)}}, {}), "hash", 1)
        first, second = hand_over.submit(committed), hand_over.submit(waiting)
        Committer(paths).commit(committed)  # by a recorder that dies before it says so
        hand_over.recorder_died()
        no_descriptor_is_left()
        if is_given_up:
            hand_over.recorder_given_up()
        else:
            hand_over.recorder_restarted()
        assert first.exception(0).errno == errno.EMFILE
        assert second.done() is is_given_up, "else the recorder that follows the folder commits it"
        assert not is_given_up or second.exception().errno == errno.EMFILE


@pytest.mark.parametrize("what", ["lost", "damaged"])
def test_a_checkpoint_that_is_lost_or_damaged_when_its_recorder_has_died_is_a_failure(tmp_path, what):
    paths, name = PathProvider(tmp_path, "run00000"), "E2_U2_S2"
    other = "E1_U1_S1" if what == "lost" else "E3_U3_S3"  # neither stands for it
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        for each in (name, other):
            write_partial(paths.checkpoints_dir / each, pack_state({"model": {"w": torch.ones(3)}}, {}), "hash", 1)
        done = hand_over.submit(name)
        Committer(paths).commit(name)
        if what == "lost":
            shutil.rmtree(paths.checkpoints_dir / name)
        else:
            (paths.checkpoints_dir / name / "model.safetensors").write_bytes(b"")
        hand_over.submit(other)
        hand_over.recorder_died()
        hand_over.recorder_restarted()
        assert done.exception(0).errno == errno.EIO


def test_a_checkpoint_whose_hand_over_cannot_be_looked_at_is_judged_by_itself(tmp_path, monkeypatch):
    paths, name = PathProvider(tmp_path, "run00000"), "E1_U1_S1"
    with RunLock(paths.lock) as lock:
        hand_over = RemoteHandOver(DeadRecorder(), 1, paths, lock)
        write_partial(paths.checkpoints_dir / name, pack_state({"model": {"w": torch.ones(3)}}, {}), "hash", 1)
        done = hand_over.submit(name)
        Committer(paths).commit(name)

        def stat(path, *given, stat=os.stat, **named):
            if str(path).endswith(READY):
                raise OSError(errno.EIO, "Input/output error")
            return stat(path, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat)
            hand_over.recorder_died()
        hand_over.recorder_restarted()
        assert done.done() and done.exception() is None
