"""Mirrors a run's artifacts from its folder to its tracker's store."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from ksuit_runner.counter import Progress
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.atomic_files import write_json
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, is_below, parse_json, read_json, read_text
from ksuit_runner.tracker.base import BaseTracker

_MANIFEST = "manifest.json"  # written and uploaded as the last file of a checkpoint: without it the others do not count


class Mirror:
    """Uploads what is new or changed, and deletes what was removed, by a list of what was uploaded before.

    The order makes it possible to resume from the copy at any moment: a checkpoint comes after all metrics before it,
    its manifest after its other files, ``latest`` and ``tags.json`` after the checkpoints that they name, and deletions
    come last.

    Args:
        tracker: Tracker, bound to the run.
        paths: Paths of the run.
        are_metrics_sent: Returns whether the tracker has all metrics up to now; may wait for a while.
        check_owner: Raises an error if the run is no longer this process's to record; called before every change.
    """

    def __init__(
        self,
        tracker: BaseTracker,
        paths: PathProvider,
        are_metrics_sent: Callable[[], bool],
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._tracker = tracker
        self._paths = paths
        self._are_metrics_sent = are_metrics_sent
        self._check_owner = check_owner
        self._known = _read_known(paths)

    def missing(self) -> list[str]:
        """Return the paths, below the artifact root, of files and checkpoints that are not uploaded yet."""
        return self._only_here(self._here())

    def adopt(self) -> None:
        """Mark everything as uploaded, after it was downloaded from the store."""
        self._known |= self._here()
        self._store()

    def update(self) -> int:
        """Upload and delete what differs, and return how many files and checkpoints were uploaded.

        Raises:
            TrackerError: Something could not be uploaded; what came before it is.
            OSError: A file could not be read.
        """
        count = 0
        for path, fingerprint in [*_files(self._paths), *_checkpoints(self._paths)]:
            if self._known.get(path) != fingerprint:
                count += self._upload(path, fingerprint)
        count += self._point()
        here = self._here()
        if self._only_here(here):
            return count  # new since then: the store needs what it replaces until it is uploaded
        for path in sorted(self._known.keys() - here.keys() - {self._paths.log.name}):
            self._check_owner()
            self._tracker.delete_artifacts(path)
            del self._known[path]
            self._store()
        return count

    def upload_log(self) -> int:
        """Upload the run's log, if it has grown, and return how many files that were."""
        log = self._paths.log
        if not log.exists() or self._known.get(log.name) == (fingerprint := _stat(log)):
            return 0
        self._check_owner()
        self._tracker.upload(log, log.name)
        self._remember(log.name, fingerprint)
        return 1

    def _here(self) -> dict[str, str]:
        return dict([*_files(self._paths), *_checkpoints(self._paths), *_pointers(self._paths)])

    def _only_here(self, here: Mapping[str, str]) -> list[str]:
        return [path for path, fingerprint in here.items() if self._known.get(path) != fingerprint]

    def _upload(self, path: str, fingerprint: str) -> int:
        source = self._paths.artifacts_dir / path
        if source.is_dir() and not self._are_metrics_sent():
            raise TrackerError("the metrics before a checkpoint are not recorded yet")
        self._remember(path, "")  # if it is pruned in the middle of the upload, the uploaded part is deleted
        try:
            files = [source] if source.is_file() else sorted(source.iterdir(), key=lambda file: file.name == _MANIFEST)
            for file in files:
                self._check_owner()
                self._tracker.upload(file, str(file.relative_to(self._paths.artifacts_dir)))
        except (TrackerError, OSError):
            if source.exists():
                raise
            return 0  # pruned meanwhile
        self._remember(path, fingerprint)
        return 1

    def _point(self) -> int:
        """Upload ``latest`` and ``tags.json`` as they are now, if the checkpoints that they name are uploaded."""
        count = 0
        for file in (self._paths.latest, self._paths.tags):
            path, text = str(file.relative_to(self._paths.artifacts_dir)), _read(file)
            if not text or self._known.get(path) == _crc(text):
                continue
            if any(self._is_only_here(name) for name in _named(text)):
                continue  # written after the checkpoints were listed; uploaded by the next update
            with tempfile.TemporaryDirectory() as folder:  # the file itself may name a newer one before it is read
                copy = Path(folder) / file.name
                copy.write_text(text)
                self._check_owner()
                self._tracker.upload(copy, path)
            self._remember(path, _crc(text))
            count += 1
        return count

    def _is_only_here(self, checkpoint: str) -> bool:
        folder = self._paths.checkpoints_dir / checkpoint
        return folder.is_dir() and not self._known.get(str(folder.relative_to(self._paths.artifacts_dir)))

    def _remember(self, path: str, fingerprint: str) -> None:
        self._known[path] = fingerprint
        self._store()

    def _store(self) -> None:
        self._check_owner()
        write_json(self._paths.uploaded, self._known)


def _files(paths: PathProvider) -> Iterator[tuple[str, str]]:
    """Yield the files of a run besides its checkpoints, each with a fingerprint of its version."""
    walk = os.walk(paths.artifacts_dir)  # which passes over what is removed meanwhile
    for file in sorted(Path(folder) / name for folder, _, names in walk for name in names):
        inside = file.relative_to(paths.artifacts_dir)
        is_hidden = any(part.startswith(".") for part in inside.parts)  # being written
        if not is_hidden and paths.checkpoints_dir not in file.parents and file.is_file() and not file.is_symlink():
            with suppress(FileNotFoundError):
                yield str(inside), _stat(file)


def _checkpoints(paths: PathProvider) -> Iterator[tuple[str, str]]:
    """Yield the complete checkpoints of a run, oldest first, each with a fingerprint of its manifest."""
    folders = [file.parent for file in paths.checkpoints_dir.glob(f"*/{_MANIFEST}") if not file.parent.is_symlink()]
    found = [(progress.update, path) for path in folders if (progress := Progress.parse(path.name))]
    for _, path in sorted(found):
        if text := _read(path / _MANIFEST):  # empty if it was removed meanwhile
            yield str(path.relative_to(paths.artifacts_dir)), _crc(text)


def _pointers(paths: PathProvider) -> Iterator[tuple[str, str]]:
    for file in (paths.latest, paths.tags):
        if text := _read(file):
            yield str(file.relative_to(paths.artifacts_dir)), _crc(text)


def _named(text: str) -> set[str]:
    """Return the checkpoints that the text of ``latest`` or ``tags.json`` names."""
    try:
        return set(conform(dict[str, str], parse_json(text)).values())
    except UnsafeFileError:
        return {text.strip()}


def _read(file: Path) -> str:
    try:
        return read_text(file, file.parent)
    except UnsafeFileError:
        return ""


def _stat(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _crc(text: str) -> str:
    return f"{crc32(text.encode()):08x}"


def _read_known(paths: PathProvider) -> dict[str, str]:
    try:
        found = read_json(paths.uploaded, paths.runs_dir)
    except UnsafeFileError:
        return {}  # uploading everything again changes nothing
    pairs = found.items() if isinstance(found, dict) else ()
    # What is known and no longer here gets deleted in the store.
    return {path: str(fingerprint) for path, fingerprint in pairs if is_below(path)}
