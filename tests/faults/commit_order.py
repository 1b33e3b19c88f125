"""The order of what all processes of a run do on the disk: files, fsync, rename, fsync of the folder; then removals."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from disk import SURVIVALS, Disk
from watched_calls import Step

_CHECKPOINT = re.compile(r"(.*/checkpoints)/(E\d+_U(\d+)_S\d+)(/.*)?")
_LINE_STEP = re.compile(rb'"s":(\d+)')
# Not needed after a power cut: who holds a lock, how far the points were sent, which are sent again, and how long a run
# is that is going on.
_MAY_BE_LOST = re.compile(r".*/(lock\.json|recorder\.lock|metrics\.sent|length|run\.log)")
_WRITES = ("open", "write", "truncate", "rename")


class OrderedDisk(Disk):
    """A disk that checks, at every operation, what is relied on, and what is removed.

    Attributes:
        committed: Names of the checkpoints that were committed.
        removed: Names of those that were removed.
    """

    def __init__(self, folder: Path, before: Callable[[Step], None] = lambda step: None) -> None:
        super().__init__(folder, self._check)
        self.committed: list[str] = []
        self.removed: list[str] = []
        self._then = before
        self._read_back: set[str] = set()

    def writers(self) -> dict[str, set[str]]:
        """Return which processes have written each file."""
        found = defaultdict(set)
        for step in self.log:
            if step.what in _WRITES:
                found[step.target or step.path].add(step.process)
        return found

    def needed_but_unsynced(self) -> list[str]:
        """Return what a power cut at this moment could change that is needed."""
        return [path for path in self.unsynced() if not _MAY_BE_LOST.fullmatch(path)]

    def _check(self, step: Step) -> None:
        self._then(step)
        source, target = _CHECKPOINT.fullmatch(step.path), _CHECKPOINT.fullmatch(step.target)
        if step.what == "read" and source:
            self._read_back.add(step.path)
        if step.what in ("unlink", "rmdir", "rename") and source and source[2] not in self.removed:
            self._check_removal(step, source[1], source[2])
        if step.what == "rename" and not step.target.endswith(".ready") and not _MAY_BE_LOST.fullmatch(step.target):
            assert self.unsynced(step.path) == [], f"{step}: what gets its name is not on the disk"
        if step.what == "rename" and target:
            self._check_journal(step, target[1], int(target[3]))
            self._read_back = {path for path in self._read_back if not path.startswith(step.target)}
            self.committed.append(target[2])
        if step.what == "rename" and step.target.endswith("/checkpoints/latest"):
            name = (self.folder / step.path).read_text().strip()
            self._check_durable(step, f"{Path(step.target).parent}/{name}")

    def _check_removal(self, step: Step, checkpoints: str, name: str) -> None:
        self.removed.append(name)
        latest = self.after_cut(SURVIVALS["only what was synced"])[f"{checkpoints}/latest"]
        assert latest is not None
        newest = latest.decode().strip()
        assert newest not in self.removed, f"{step}: it is needed"
        files = self._check_durable(step, f"{checkpoints}/{newest}")
        assert files <= self._read_back, f"{step}: {newest} was not read back: {sorted(files - self._read_back)}"

    def _check_durable(self, step: Step, checkpoint: str) -> set[str]:
        """Check that a checkpoint survives a power cut, and return its files."""
        left = self.after_cut(SURVIVALS["only what was synced"])
        files = {path for path, content in left.items() if path.startswith(f"{checkpoint}/") and content is not None}
        assert files and self.unsynced(checkpoint) == [], f"{step}: {checkpoint} is not on the disk"
        return files

    def _check_journal(self, step: Step, checkpoints: str, update: int) -> None:
        journal = str(Path(checkpoints).parents[1] / "metrics.jsonl")
        synced = self.after_cut(SURVIVALS["only what was synced"]).get(journal) or b""
        lines = (self.folder / journal).read_bytes()[len(synced) :].splitlines()
        lost = [line for line in lines if (found := _LINE_STEP.search(line)) and int(found[1]) <= update]
        assert not lost, f"{step}: its metrics are not on the disk: {lost[:3]}"
