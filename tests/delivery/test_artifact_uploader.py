import shutil
import threading
from pathlib import Path

import pytest

from ksuit_runner.delivery.artifact_uploader import Uploader
from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.tracker.noop import NoopTracker


class RemoteTracker(NoopTracker):
    """Keeps artifacts in another folder; can be away, and can hang."""

    artifacts_are_local = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.is_away = False
        self.gate = threading.Event()
        self.gate.set()
        self.has_begun = threading.Event()

    def upload(self, path: Path, artifact_path: str) -> None:
        self.has_begun.set()
        assert self.gate.wait(60)
        if self.is_away:
            raise TrackerError("the server is away")
        (self.folder / artifact_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.folder / artifact_path)


@pytest.fixture
def store(tmp_path: Path) -> RemoteTracker:
    return RemoteTracker(tmp_path / "there")


@pytest.fixture
def paths(tmp_path: Path, store: RemoteTracker) -> PathProvider:
    outputs = OutputPaths(tmp_path / "outputs")
    tracker = RecordedTracker(store, outputs)
    paths = PathProvider(outputs.output_dir, tracker.start_run(None, {}).run_id)
    paths.artifacts_dir.mkdir(parents=True)
    paths.config.write_text("seed: 1")
    paths.log.write_text("began")
    return paths


def _uploader(store: RemoteTracker, paths: PathProvider) -> Uploader:
    binding = Binding(store, paths, lambda: None)
    binding.bind()
    return Uploader(binding, paths, lambda: True, interval_s=0.01)


def test_everything_is_there_at_the_end(store: RemoteTracker, paths: PathProvider) -> None:
    uploader = _uploader(store, paths)
    assert uploader.missing() == 1
    assert uploader.finish(30)
    assert uploader.missing() == 0
    assert sorted(path.name for path in store.folder.iterdir()) == ["config.yaml", "run.log"]
    uploader.close()


def test_an_outage_is_said_once_and_what_it_left_out_is_uploaded_after_it(
    store: RemoteTracker, paths: PathProvider, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = _uploader(store, paths)
    store.is_away = True
    uploader.request()
    assert store.has_begun.wait(30)
    assert not uploader.finish(0.2)
    assert uploader.is_failing
    store.is_away = False
    assert uploader.finish(30)
    uploader.close()
    assert caplog.text.count("the server is away") == 1
    assert (store.folder / "config.yaml").read_text() == "seed: 1"


def test_an_upload_that_hangs_holds_nobody(store: RemoteTracker, paths: PathProvider) -> None:
    uploader = _uploader(store, paths)
    store.gate.clear()
    uploader.request()
    assert store.has_begun.wait(30)
    assert not uploader.finish(0.05)
    uploader.close()
    assert uploader.missing() == 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "artifact-upload")
    store.gate.set()


def test_what_is_where_the_store_looks_for_it_is_not_uploaded(
    store: RemoteTracker, paths: PathProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteTracker, "artifacts_are_local", True)
    uploader = _uploader(store, paths)
    assert uploader.finish(30)
    assert uploader.missing() == 0
    uploader.close()
    assert not store.folder.exists()
