"""The content of a checkpoint: it is written to a folder of its own, and read only if all of it is intact."""

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
from ksuit_runner.checkpoint.base_weights import BASE
from ksuit_runner.checkpoint.folders import PARTIAL, beside, names
from ksuit_runner.checkpoint.manifest import verify, write_file, write_manifest
from ksuit_runner.checkpoint.state_types import Packer, callback_location, pointer, unpack
from ksuit_runner.checkpoint.tensor_file import METADATA, fits_file, parts
from ksuit_runner.counter import Progress
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.untrusted_files import UnsafeFileError

_LOGGER = logging.getLogger(__name__)

MODEL, STATE_TENSORS, STATE = "model.safetensors", "trainer.safetensors", "trainer.json"
RESERVED = ("model", "trainer")
"""Names of files that no callback may write."""
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

    @property
    def base(self) -> dict[str, str]:
        """Checksums of the weights that ``model`` lacks, by name: they are those that the run began with."""
        found: dict[str, str] = self.state.get(BASE, {})
        return found


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


def write_partial(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    document: Mapping[str, Any],
    config_hash: str,
    keep_last: int,
    tags: Sequence[str] = (),
) -> None:
    """Write the files of a checkpoint to ``.NAME.tmp``, to be handed over to whoever commits it (``HandOver``).

    Nothing waits for the disk.

    Args:
        folder: Its final path; its name is the position.
        files: Tensors by name, for each safetensors file by its name without the suffix.
        document: What ``pack_state`` returns for ``trainer.json``.
        config_hash: Hash of the run's config.
        keep_last: Number of newest checkpoints that the run keeps.
        tags: Tags that it is written for.

    Raises:
        OSError: It could not be written; nothing has changed.
    """
    temporary = beside(folder, PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        written = {}
        for name, tensors in files.items():
            file = f"{name}.safetensors"
            written[file] = write_file(temporary / file, parts(tensors))
        written[STATE] = write_file(temporary / STATE, [msgspec.json.encode(document)])
        versions = {"ksuit_runner": __version__, "torch": torch.__version__}
        is_unfinished = document.get("unfinished") is not None
        write_manifest(temporary, written, folder.name, config_hash, is_unfinished, versions, keep_last, tags)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    base = known.get(BASE, {})
    if not isinstance(base, dict) or not all(isinstance(item, str) for pair in base.items() for item in pair):
        raise ValueError("the checksums of the weights that are not in it are no texts")
