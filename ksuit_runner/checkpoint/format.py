"""The format of a checkpoint on disk: a folder is written atomically, and read only if all of it is intact."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from ksuit_runner import __version__
from ksuit_runner.checkpoint.manifest import verify, write_file, write_manifest
from ksuit_runner.checkpoint.state_types import Packer, callback_location, pointer, unpack
from ksuit_runner.checkpoint.tensor_file import METADATA, fits_file, parts
from ksuit_runner.counter import Progress
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.atomic_files import commit_folder, make_folder
from ksuit_runner.system.untrusted_files import UnsafeFileError, is_behind_link

_LOGGER = logging.getLogger(__name__)

MODEL, STATE_TENSORS, STATE = "model.safetensors", "trainer.safetensors", "trainer.json"
RESERVED = ("model", "trainer")
"""Names of files that no callback may write."""
_PARTIAL, _REPLACED = ".tmp", ".old"
_LISTED = 5


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        paths: Paths of the run with ``checkpoint_dir`` set.
        progress: Position that it was written at.
        model: What the model's ``state_dict`` held, by name.
        state: ``trainer`` and ``callbacks`` (by name).
        config_hash: Hash of the config that it was written under.
        tags: Tags that it was written for.
    """

    paths: PathProvider
    progress: Progress
    model: dict[str, Any]
    state: dict[str, Any]
    config_hash: str
    tags: tuple[str, ...] = ()


def pack_state(
    files: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the content of a checkpoint's files, after a check that all of it can be read back.

    What a safetensors file cannot hold of the model (extra state, sparse tensors ...) goes into the state.

    Args:
        files: Tensors by name, for each file; those of ``model`` may be anything that a ``state_dict`` holds.
        state: State of trainer and callbacks; a missing one is empty.

    Returns:
        The tensors of every file, ``trainer`` among them, and the document for ``trainer.json``.

    Raises:
        CheckpointError: Something cannot be stored; the message names it.
    """
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in files}
    packer, extra = Packer(), {}
    for name, values in files.items():
        for key, value in values.items():
            if fits_file(value) and key != METADATA:
                tensors[name][key] = value
            elif name == "model":
                extra[key] = packer.pack(f"model[{key!r}]", value, pointer("model", key))
            else:
                raise CheckpointError(
                    f"{name}.safetensors: {key!r} is not a dense tensor, and the file can hold nothing else"
                )
    packed = {key: packer.pack(key, value, pointer(key)) for key, value in state.items() if key != "callbacks"}
    callbacks = {
        name: packer.pack(callback_location(name), value, pointer("callbacks", name))
        for name, value in state.get("callbacks", {}).items()
    }
    document = {"trainer": {}, **packed, "callbacks": callbacks, **({"model": extra} if extra else {})}
    return {**tensors, "trainer": packer.tensors}, document


def write_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    document: Mapping[str, Any],
    config_hash: str,
    tags: Sequence[str] = (),
) -> None:
    """Write a checkpoint atomically: the folder has everything in it, or does not exist.

    Args:
        folder: Its final path; its name is the position.
        files: Tensors by name, for each safetensors file by its name without the suffix.
        document: What ``pack_state`` returns for ``trainer.json``.
        config_hash: Hash of the run's config.
        tags: Tags that it is written for.

    Raises:
        OSError: It could not be written; nothing has changed.
    """
    temporary = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    _finish_replacement(folder)
    make_folder(folder.parent)
    temporary.mkdir()
    try:
        written = {
            path.name: write_file(path, parts(tensors))
            for name, tensors in files.items()
            for path in [temporary / f"{name}.safetensors"]
        }
        written[STATE] = write_file(temporary / STATE, [msgspec.json.encode(document)])
        versions = {"ksuit_runner": __version__, "torch": torch.__version__}
        write_manifest(temporary, written, folder.name, config_hash, is_unfinished(document), versions, tags)
        if folder.exists():
            folder.rename(_aside(folder))  # if the process is killed before the next rename, `recover` undoes this one
        commit_folder(temporary, folder)
    finally:
        _finish_replacement(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def names(paths: PathProvider) -> list[str]:
    """Return the names of a run's checkpoints, newest first, intact or not."""
    if not _has_folder(paths):
        return []
    found = [(Progress.parse(path.name), path.name) for path in paths.checkpoints_dir.iterdir()]
    whole = [(progress, name) for progress, name in found if progress is not None]
    return [name for _, name in sorted(whole, key=lambda item: item[0].update, reverse=True)]


def recover(paths: PathProvider) -> None:
    """Clean up after a killed process: restore the checkpoint that it was replacing, remove half-written ones.

    Only the process that holds the run's lock may call this; it does so before it reads or writes a checkpoint.
    """
    for replaced in _replaced(paths):
        _finish_replacement(replaced)
    for path in paths.checkpoints_dir.glob(f".*{_PARTIAL}") if _has_folder(paths) else ():
        shutil.rmtree(path, ignore_errors=True)


def needs_recovery(paths: PathProvider) -> bool:
    """Whether there is a checkpoint that ``recover`` would restore; or it is being replaced right now."""
    return any(not replaced.exists() for replaced in _replaced(paths))


def _replaced(paths: PathProvider) -> list[Path]:
    """Return the folders of the checkpoints that were moved aside to be replaced."""
    found = paths.checkpoints_dir.glob(f".*{_REPLACED}") if _has_folder(paths) else ()
    return [path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED)) for path in found]


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_REPLACED}")


def _finish_replacement(folder: Path) -> None:
    """Remove the checkpoint that was moved aside; if nothing has replaced it, move it back."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(folder)


def _has_folder(paths: PathProvider) -> bool:
    return paths.checkpoints_dir.is_dir() and not is_behind_link(paths.checkpoints_dir, paths.runs_dir)


def has_traces(paths: PathProvider) -> bool:
    """Whether a run ever had a checkpoint, even if none is left: then it may not silently start over.

    What a process left half written when it was killed is hidden and does not count.
    """
    folder = paths.checkpoints_dir
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return True
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file, or None if it is as it was written."""
    try:
        verify(folder, _root(folder))
    except UnsafeFileError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def holds(folder: Path, state: Mapping[str, Any], config_hash: str) -> bool:
    """Whether a checkpoint is intact, and is what a state at its position would be written as.

    Under another config it holds other states; and what followed an update may have been half done when it was written.
    """
    try:
        manifest = verify(folder, _root(folder))
    except (UnsafeFileError, OSError):
        return False
    return (manifest["config_hash"], manifest["unfinished"]) == (config_hash, is_unfinished(state))


def is_unfinished(state: Mapping[str, Any]) -> bool:
    """Whether a state was taken while what follows an update was half done."""
    return state.get("unfinished") is not None


def _root(folder: Path) -> Path:
    """Return the folder that holds the folders of all runs, for ``RUN/artifacts/checkpoints/NAME``."""
    return folder.parents[3]


def read_newest(paths: PathProvider, name: str | None = None) -> Checkpoint:
    """Read the newest intact checkpoint of a run, with a warning for every damaged one that is skipped.

    Args:
        paths: Paths of the run.
        name: Read this one only.

    Raises:
        CheckpointError: There is none, none that is intact, or none of this name.
    """
    existing = names(paths)
    if name is not None and name not in existing:
        there = ", ".join(existing[:_LISTED]) + (" …" if len(existing) > _LISTED else "") if existing else "none"
        raise CheckpointError(f"run {paths.run_id} has no checkpoint {name[:50]!r}. There are: {there}")
    problems = {}
    for candidate in existing if name is None else [name]:
        try:
            return _checkpoint(paths.at_checkpoint(candidate))
        except UnsafeFileError as error:
            problems[candidate] = str(error)
            _LOGGER.warning("checkpoint %s is damaged and skipped: %s", paths.checkpoints_dir / candidate, error)
    if not problems:
        raise CheckpointError(f"run {paths.run_id} has no checkpoint in {paths.checkpoints_dir}: it cannot be resumed")
    listed = "".join(f"\n  {candidate}: {problem}" for candidate, problem in list(problems.items())[:_LISTED])
    raise CheckpointError(f"run {paths.run_id}: no checkpoint in {paths.checkpoints_dir} can be read{listed}")


def _checkpoint(paths: PathProvider) -> Checkpoint:
    progress = Progress.parse(paths.checkpoint_dir.name)
    assert progress is not None
    try:
        manifest, model, state = _read(paths.checkpoint_dir, paths.runs_dir)
    except OSError as error:
        raise UnsafeFileError(f"it cannot be read ({error.strerror})") from None
    return Checkpoint(paths, progress, model, state, manifest["config_hash"], tuple(manifest["tags"]))


def _read(folder: Path, root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Verify and read a checkpoint; any error in reading a file counts as damage.

    Returns:
        The manifest, the model's values, and the state.
    """
    manifest = verify(folder, root)
    if missing := [file for file in (MODEL, STATE_TENSORS, STATE) if file not in manifest["files"]]:
        raise UnsafeFileError(f"{missing[0]} is missing")
    tensors = _load(folder / STATE_TENSORS, safetensors.torch.load_file)
    state = _load(folder / STATE, lambda path: _read_state(path, tensors))
    for file in manifest["files"]:  # callbacks read theirs later, when it is too late to choose another checkpoint
        if file.endswith(".safetensors") and file not in (MODEL, STATE_TENSORS):
            _load(folder / file, _read_header)
    model = _load(folder / MODEL, safetensors.torch.load_file)
    return manifest, {**model, **state.pop("model", {})}, state


def _read_state(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state = unpack(msgspec.json.decode(path.read_bytes()), tensors)
    _check_shape(state)
    assert isinstance(state, dict)
    return state


def _load(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except Exception as error:  # the libraries raise a dozen types of errors
        lines = str(error).splitlines() or [type(error).__name__]
        raise UnsafeFileError(f"{path.name} cannot be loaded ({lines[0][:200]})") from None


def _read_header(path: Path) -> None:
    with safetensors.safe_open(path, "pt"):
        pass


def _check_shape(state: Any) -> None:
    known = {"model": {}, **state} if isinstance(state, dict) else {}
    if not all(isinstance(known.get(part), dict) for part in ("trainer", "callbacks", "model")):
        raise ValueError("it is not the state of a trainer and its callbacks")
    if not all(isinstance(name, str) for name in known["callbacks"]):
        raise ValueError("the name of a callback is not a string")
