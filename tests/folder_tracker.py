"""A tracker whose store is a folder."""

import shutil
from pathlib import Path

from ksuit_runner.errors import TrackerError
from ksuit_runner.tracker.noop import NoopTracker


class FolderTracker(NoopTracker):
    """Stores artifacts in another folder; fails at the path ``fails_at``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.log: list[str] = []
        self.fails_at = ""

    def upload(self, path: Path, artifact_path: str) -> None:
        if artifact_path == self.fails_at:
            raise TrackerError("the server is away")
        self.log.append(artifact_path)
        (self.folder / artifact_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.folder / artifact_path)

    def delete_artifacts(self, path: str) -> None:
        self.log.append(f"-{path}")
        target = self.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
