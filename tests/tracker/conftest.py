from collections.abc import Callable
from pathlib import Path

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker.mlflow import MlflowTracker


@pytest.fixture
def tracker(paths: OutputPaths) -> MlflowTracker:
    tracker = MlflowTracker(paths)
    tracker.start_run("digits", {"author": "me"})
    return tracker


@pytest.fixture
def check_artifacts(tmp_path: Path) -> Callable[[MlflowTracker], None]:
    """Store, list, read and delete artifacts of the tracker's run, wherever they are stored."""
    return lambda tracker: _check_artifacts(tracker, tmp_path)


def _check_artifacts(tracker: MlflowTracker, tmp_path: Path) -> None:
    folder = tmp_path / "E1_U2_S3"
    folder.mkdir()
    (folder / "weights").write_bytes(b"123")
    (tmp_path / "config.yaml").write_text("seed: 1")
    tracker.upload(folder, "checkpoints/E1_U2_S3")
    tracker.upload(tmp_path / "config.yaml", "config.yaml")
    tracker.upload(tmp_path / "config.yaml", "plots/config.yaml")
    assert sorted(tracker.list_artifacts()) == ["checkpoints", "config.yaml", "plots"]

    there = tmp_path / "there"
    assert tracker.download("checkpoints/E1_U2_S3", there) == there / "E1_U2_S3"
    assert (there / "E1_U2_S3" / "weights").read_bytes() == b"123"
    assert tracker.download("config.yaml", there, tracker.run_id).read_text() == "seed: 1"
    with pytest.raises(TrackerError):
        tracker.download("nothing", there)

    tracker.delete_artifacts("checkpoints/E1_U2_S3")
    tracker.delete_artifacts("checkpoints/E1_U2_S3")
    tracker.delete_artifacts("plots/config.yaml")
    assert tracker.list_artifacts("checkpoints") == tracker.list_artifacts("plots") == []
    assert folder.exists()
