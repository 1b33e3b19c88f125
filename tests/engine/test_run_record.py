import pytest

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.engine.run_record import RunRecord
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch, store
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker

CONFIG = {"name": None, "parent_run_id": None, "trainer": {"recall@5 (macro)": 1}}


def test_a_run_that_ended_before_it_was_described_is_described_at_its_resume(maker, monkeypatch):
    data, provenance = maker.trainer().data_container, Provenance()
    launch = Launch("ksuit", [])
    first = RunRecord.begin(NoopTracker(), maker.paths(), CONFIG, launch, provenance)
    store(first.paths, CONFIG, launch)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stale"):
        patch.setattr(type(data), "describe", lambda self: (_ for _ in ()).throw(OSError("stale file handle")))
        first.describe(CONFIG, data, provenance)
    first.close(EndStatus.FAILED)
    paths = PathProvider(maker.folder, first.paths.run_id)
    paths.environment.unlink()  # as a kill a moment earlier leaves it
    for value in (1, 2):  # what was recorded once stays
        lock = RunLock(paths.lock)
        lock.acquire()
        record = RunRecord.resume(NoopTracker(), paths, lock)
        record.describe({**CONFIG, "seed": value}, data, provenance)
        record.close(EndStatus.FINISHED)
        box = Outbox.load(paths)
        assert box.params == {"trainer.recall@5 (macro)": "1", "seed": "1"}
        assert [info.name for info in box.inputs] == ["augmented/train", "augmented/test"]
    assert '"torch"' in paths.environment.read_text()


class Away(NoopTracker):
    """Cannot be reached for a deletion while it has failures."""

    failures = 0
    close_timeout_s = 0.5

    def delete_run(self):
        if self.failures:
            raise TrackerError("away")


@pytest.mark.parametrize("failures", [0, 1])
def test_a_refused_run_leaves_its_folder_only_as_long_as_the_tracker_has_not_been_told(maker, caplog, failures):
    tracker = Away()
    record = RunRecord.begin(tracker, maker.paths(), CONFIG, Launch("ksuit", []), Provenance(), Recording.of_owner)
    tracker.failures = failures
    record.close(EndStatus.FAILED, never_began=True)
    assert record.paths.run_dir.exists() == bool(failures)
    assert (f"sync={record.paths.run_id}" in caplog.text) == bool(failures)
    if failures:
        tracker.failures = 0
        assert "is withdrawn" in Recording(tracker, record.paths).deliver_all()
