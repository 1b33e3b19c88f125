import shutil
from pathlib import Path

import pytest
from folder_tracker import FolderTracker

from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.errors import TakenOverError, TrackerError
from ksuit_runner.paths import PathProvider


@pytest.fixture
def paths(tmp_path: Path) -> PathProvider:
    paths = PathProvider(tmp_path, "run00000")
    paths.checkpoints_dir.mkdir(parents=True)
    paths.config.write_text("seed: 1")
    return paths


@pytest.fixture
def tracker(tmp_path: Path) -> FolderTracker:
    return FolderTracker(tmp_path / "there")


def write(paths: PathProvider, name: str, content: str = "") -> None:
    folder = paths.checkpoints_dir / name
    folder.mkdir(exist_ok=True)
    for file in ("manifest.json", "model.safetensors", "trainer.json"):
        (folder / file).write_text(f"{name} {file} {content}")
    paths.latest.write_text(f"{name}\n")
    paths.tags.write_text(f'{{"best": "{name}"}}')


def is_same(paths: PathProvider, tracker: FolderTracker) -> bool:
    here, there = (
        {path.relative_to(root): path.read_text() for path in root.rglob("*") if path.is_file()}
        for root in (paths.artifacts_dir, tracker.folder)
    )
    return here == there


FIRST, SECOND, THIRD = "E1_U2_S12", "E5_U10_S60", "E6_U12_S72"


def test_each_file_comes_after_what_it_needs(paths, tracker):
    write(paths, SECOND)
    write(paths, FIRST)
    write(paths, SECOND)
    mirror = Mirror(tracker, paths, lambda: True)
    assert len(mirror.missing()) == 5
    assert mirror.update() == 5
    parts = ("model.safetensors", "trainer.json", "manifest.json")
    folders = [[f"checkpoints/{name}/{part}" for part in parts] for name in (FIRST, SECOND)]
    assert sorted(tracker.log[1:3]) == sorted(folders[0][:2])
    assert [tracker.log[0], tracker.log[3], tracker.log[6:]] == [
        "config.yaml",
        folders[0][2],
        [folders[1][2], "checkpoints/latest", "checkpoints/tags.json"],
    ]
    assert is_same(paths, tracker)
    assert mirror.missing() == []


def test_what_is_there_is_not_uploaded_again_also_by_another_process(paths, tracker):
    write(paths, FIRST)
    Mirror(tracker, paths, lambda: True).update()
    tracker.log.clear()
    assert Mirror(tracker, paths, lambda: True).update() == 0
    assert tracker.log == []
    write(paths, FIRST, "of another config")
    assert Mirror(tracker, paths, lambda: True).update() == 1
    assert is_same(paths, tracker)


def test_after_an_outage_everything_that_is_kept_comes_and_what_is_not_goes(paths, tracker):
    mirror = Mirror(tracker, paths, lambda: True)
    write(paths, FIRST)
    mirror.update()
    write(paths, SECOND)
    tracker.fails_at = f"checkpoints/{SECOND}/manifest.json"
    with pytest.raises(TrackerError):
        mirror.update()
    assert (tracker.folder / "checkpoints" / "latest").read_text() == f"{FIRST}\n"
    shutil.rmtree(paths.checkpoints_dir / SECOND)  # pruned while the server was away, and half of it is there
    write(paths, THIRD)
    tracker.fails_at = ""
    assert Mirror(tracker, paths, lambda: True).update() == 3
    assert tracker.log[-1] == f"-checkpoints/{SECOND}"
    assert is_same(paths, tracker)


def test_a_checkpoint_waits_for_the_metrics_before_it(paths, tracker):
    write(paths, FIRST)
    with pytest.raises(TrackerError, match="metrics before a checkpoint"):
        Mirror(tracker, paths, lambda: False).update()
    assert tracker.log == ["config.yaml"]


def test_latest_waits_for_a_checkpoint_that_came_meanwhile(paths, tracker):
    write(paths, FIRST)

    def sent_and_committed() -> bool:
        write(paths, SECOND)
        return True

    mirror = Mirror(tracker, paths, sent_and_committed)
    mirror.update()
    assert not (tracker.folder / "checkpoints" / "latest").exists()
    mirror.update()
    assert is_same(paths, tracker)


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_failure(paths, tracker):
    write(paths, FIRST)
    write(paths, SECOND)

    def sent_and_pruned() -> bool:
        shutil.rmtree(paths.checkpoints_dir / FIRST, ignore_errors=True)
        return True

    Mirror(tracker, paths, sent_and_pruned).update()
    assert is_same(paths, tracker)


def test_what_is_pruned_stays_there_until_the_checkpoint_that_replaces_it_is_there(paths, tracker):
    mirror = Mirror(tracker, paths, lambda: True)
    write(paths, FIRST)
    upload = tracker.upload

    def comes_meanwhile(path, artifact_path):
        upload(path, artifact_path)
        if artifact_path.endswith("tags.json"):  # the last upload: nothing is looked for after it
            tracker.upload = upload
            write(paths, SECOND)
            shutil.rmtree(paths.checkpoints_dir / FIRST)

    tracker.upload = comes_meanwhile
    mirror.update()
    assert (tracker.folder / "checkpoints" / FIRST / "manifest.json").is_file()
    mirror.update()
    assert is_same(paths, tracker)


@pytest.mark.parametrize("when", ["at a deletion", "in a checkpoint"])
def test_nothing_changes_there_once_the_run_is_another_ones(paths, tracker, monkeypatch, when):
    taken = []

    def check():
        if taken:
            raise TakenOverError("another process has resumed it")

    mirror = Mirror(tracker, paths, lambda: True, check)
    mirror.update()
    tracker.log.clear()
    if when == "in a checkpoint":
        write(paths, FIRST)
        monkeypatch.setattr(tracker, "upload", lambda path, artifact_path: taken.append(artifact_path))
    else:
        paths.config.unlink()
        taken.append(when)
    with pytest.raises(TakenOverError):
        mirror.update()
    assert len(taken) == 1 and tracker.log == []


def test_unfinished_files_are_left_out_and_the_log_comes_when_asked_for(paths, tracker):
    (paths.artifacts_dir / ".config.yaml.tmp").write_text("half")
    (paths.checkpoints_dir / f".{FIRST}.tmp").mkdir()
    (paths.checkpoints_dir / f".{FIRST}.tmp" / "manifest.json").write_text("half")
    mirror = Mirror(tracker, paths, lambda: True)
    mirror.update()
    assert mirror.upload_log() == 0
    paths.log.write_text("began")
    assert mirror.upload_log() == 1
    assert mirror.upload_log() == 0
    mirror.update()
    assert tracker.log == ["config.yaml", "run.log"]


def test_what_was_downloaded_counts_as_uploaded(paths, tracker):
    write(paths, FIRST)
    mirror = Mirror(tracker, paths, lambda: True)
    mirror.adopt()
    assert mirror.missing() == []
    assert Mirror(tracker, paths, lambda: True).update() == 0


def test_a_damaged_list_means_everything_is_uploaded_again(paths, tracker):
    for damage in ("", "[]", "7"):
        paths.uploaded.write_text(damage)
        assert Mirror(tracker, paths, lambda: True).update() == 1
