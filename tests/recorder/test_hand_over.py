"""The training process commits checkpoints itself only once its recorder is given up."""

import pytest
import torch

from ksuit_runner.checkpoint import commit as commit_module
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.checkpoint.format import pack_state, write_ready
from ksuit_runner.paths import PathProvider
from ksuit_runner.recorder.remote import RemoteHandOver
from ksuit_runner.system.run_lock import RunLock


class DeadRecorder:
    """A client whose recorder has died, which is not noticed yet."""

    def follows(self, session):
        return False

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
        write_ready(paths.checkpoints_dir / tagged, *content, "hash", 1, ["best"])
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(commit_module, "write_text", killed)
            Committer(paths).commit(tagged)
        write_ready(paths.checkpoints_dir / newer, *content, "hash", 1, [])
        done = hand_over.submit(newer)
        assert names(paths) == [tagged] and not done.done()
        hand_over.recorder_given_up()
        assert done.done() and names(paths) == [newer, tagged] and read_tags(paths) == {"best": tagged}
