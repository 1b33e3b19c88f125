"""The folders of a run's checkpoints: which there are, and in which state; none of it is changed here."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ksuit_runner.checkpoint.manifest import rank_of, read_manifest, verify
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.untrusted_files import UnsafeFileError, is_behind_link, read_json

PARTIAL, READY, UNPACKED, REPLACED = ".tmp", ".ready", ".unpacked", ".old"
"""Suffixes of what is not a checkpoint: one being written, one to be committed, its folder if it was handed over as one
file, and one that is being replaced."""


def names(paths: PathProvider) -> list[str]:
    """Return the names of a run's checkpoints, newest first, intact or not."""
    return _newest_first(path.name for path in paths.checkpoints_dir.iterdir()) if has_folder(paths) else []


def hidden(paths: PathProvider, suffix: str) -> list[str]:
    """Return the names of checkpoints that have a hidden folder or file with a suffix, newest first."""
    found = paths.checkpoints_dir.glob(f".*{suffix}") if has_folder(paths) else ()
    return _newest_first(path.name.removeprefix(".").removesuffix(suffix) for path in found)


def _newest_first(found: Iterable[str]) -> list[str]:
    return sorted(filter(Progress.parse, found), key=update_of, reverse=True)


def update_of(name: str) -> int:
    """Return the number of updates that the name of a checkpoint says."""
    progress = Progress.parse(name)
    assert progress is not None, name
    return progress.update


def beside(folder: Path, suffix: str) -> Path:
    """Return the hidden folder or file of a checkpoint with a suffix."""
    return folder.with_name(f".{folder.name}{suffix}")


def needs_recovery(paths: PathProvider) -> bool:
    """Whether there is a checkpoint that ``Committer.recover`` would restore; or it is being committed right now."""
    replaced = hidden(paths, REPLACED)
    return bool(hidden(paths, READY)) or any(not (paths.checkpoints_dir / name).exists() for name in replaced)


def has_folder(paths: PathProvider) -> bool:
    """Whether a run has a folder of checkpoints, in its own folder."""
    return paths.checkpoints_dir.is_dir() and not is_behind_link(paths.checkpoints_dir, paths.runs_dir)


def has_traces(paths: PathProvider) -> bool:
    """Whether a run ever had a checkpoint, even if none is left: then it may not silently start over.

    What a process left half written when it was killed is hidden and does not count.
    """
    folder = paths.checkpoints_dir
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return True
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def weights_in(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint: ``model``, and those that callbacks add, such as ``ema``."""
    return {path.stem for path in folder.glob("*.safetensors") if rank_of(path.name) is None} - {"trainer"}


def weights_file(folder: Path, name: str, path: str | None = None) -> Path:
    """Return the file with the weights of a name in a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        name: The name.
        path: Config path that asks for them, for messages.

    Raises:
        ConfigError: There are no such weights.
    """
    there = weights_in(folder)
    if name not in there:
        raise ConfigError(f"checkpoint {folder.name} has no weights '{name}'. {did_you_mean(name, there)}", path)
    return folder / f"{name}.safetensors"


def damage(folder: Path, name: str | None = None, reads: Callable[[str], bool] = lambda file: True) -> str | None:
    """Return what is wrong with a checkpoint, naming the file, or None if it is as it was written.

    Args:
        folder: Its folder.
        name: Its name; by default that of the folder.
        reads: See ``verify``.
    """
    try:
        verify(folder, root_of(folder), name, reads)
    except UnsafeFileError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def root_of(folder: Path) -> Path:
    """Return the folder that holds the folders of all runs, for ``RUN/artifacts/checkpoints/NAME``."""
    return folder.parents[3]


def newest_tags(paths: PathProvider) -> dict[str, str]:
    """Return what ``read_tags`` does, where the list of tags may be older than the checkpoints.

    Each tag belongs to the newest checkpoint that was written for it, or that the list names: one that was there
    already when it got a tag has it in the list only.
    """
    found: dict[str, str] = {}
    listed = read_tags(paths)
    for name in reversed(names(paths)):
        found |= {tag: tagged for tag, tagged in listed.items() if tagged == name}
        with suppress(UnsafeFileError, OSError):
            folder = paths.checkpoints_dir / name
            found |= tagged(read_manifest(folder, root_of(folder), name)["tags"], name)
    return found


def tagged(tags: Iterable[str], name: str) -> dict[str, str]:
    """Return the checkpoint by tag for the tags that a checkpoint is written for.

    Args:
        tags: Each is its own, or gives an older checkpoint another tag when it is committed: ``TAG=CHECKPOINT``.
        name: Its name.
    """
    found: dict[str, str] = {}
    for tag in tags:
        moved, _, older = tag.rpartition("=")
        found |= {moved: older} if Progress.parse(older) else {tag: name}
    return found


def read_tags(paths: PathProvider) -> dict[str, str]:
    """Return the name of the checkpoint by tag, for all tagged checkpoints of a run; invalid entries are skipped."""
    try:
        found = read_json(paths.tags, paths.runs_dir)
    except UnsafeFileError:
        return {}
    existing = set(names(paths))
    pairs = found.items() if isinstance(found, dict) else ()
    return {tag: name for tag, name in pairs if isinstance(name, str) and name in existing}
