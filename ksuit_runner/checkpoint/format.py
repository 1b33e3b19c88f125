"""The content of a checkpoint: it is written to a folder of its own, and read only if all of it is intact."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from ksuit_runner import __version__
from ksuit_runner.checkpoint.base_weights import BASE
from ksuit_runner.checkpoint.folders import PARTIAL, beside, names
from ksuit_runner.checkpoint.hold import Hold
from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.manifest import (
    MANIFEST,
    Fingerprint,
    fingerprint_of,
    manifest_text,
    rank_of,
    verify,
    write_file,
)
from ksuit_runner.checkpoint.packed import write_packed
from ksuit_runner.checkpoint.shards import FileTensor, Shard, Shards
from ksuit_runner.checkpoint.state_types import Packer, callback_location, pointer, unpack
from ksuit_runner.checkpoint.tensor_file import METADATA, fits_file, parts
from ksuit_runner.counter import Progress
from ksuit_runner.distributed.pieces import StoredTensor, piece_of, whole
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.untrusted_files import UnsafeFileError, remove

_LOGGER = logging.getLogger(__name__)

MODEL, STATE_TENSORS, STATE = "model.safetensors", "trainer.safetensors", "trainer.json"
_TRAINER = "trainer"
RESERVED = ("model", _TRAINER)
"""Names of files that no callback may write."""
LOCAL = "local"
"""Key of the states of callbacks that differ between ranks, by name, in a state that is to be stored."""
_SHARD = ""  # stands for the files of this rank among the names of files
_LISTED = 5
_TRIES = 100  # to read a checkpoint of a run that removes them meanwhile


@dataclass(frozen=True)
class Content:
    """What a rank has for a checkpoint.

    Attributes:
        files: Tensors that all ranks have, by name, for every file; ``trainer`` is among them.
        document: What goes into ``trainer.json``.
        shard: What this rank alone has.
    """

    files: Mapping[str, Mapping[str, Tensor]]
    document: dict[str, Any]
    shard: Shard

    def copied(self, buffers: HostBuffers, with_files: bool = True) -> "Content":
        """Return the same with copies of the tensors.

        Args:
            buffers: Hold the copies.
            with_files: Whether to copy what all ranks have; it is empty otherwise.
        """
        copies = buffers.copy({**(self.files if with_files else {}), _SHARD: self.shard.tensors})
        shard = replace(self.shard, tensors=copies.pop(_SHARD))
        return Content(copies, self.document, shard)


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
        local: The states of callbacks that differed between the ranks that have written it, by name, for each rank.
        hold: What keeps the run, if it is going on, from removing it before all of its files are read.
    """

    paths: PathProvider
    progress: Progress
    model: dict[str, Any]
    state: dict[str, Any]
    config_hash: str
    tags: tuple[str, ...] = ()
    local: tuple[dict[str, Any], ...] = ()
    hold: Hold | None = None

    @property
    def base(self) -> dict[str, str]:
        """Checksums of the weights that ``model`` lacks, by name: they are those that the run began with."""
        found: dict[str, str] = self.state.get(BASE, {})
        return found


def pack_state(files: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> Content:
    """Return the content of a checkpoint, after a check that all of it can be read back.

    What a safetensors file cannot hold of the model (extra state, sparse tensors ...) goes into the state.

    Args:
        files: Tensors by name, for each file; those of ``model`` may be anything that a ``state_dict`` holds.
        state: State of trainer and callbacks; a missing one is empty.

    Raises:
        CheckpointError: Something cannot be stored; the message names it.
    """
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in files}
    packer, extra, shard = Packer(), {}, Shard()
    for name, values in files.items():
        for key, value in values.items():
            piece = piece_of(value)
            if piece is not None and fits_file(piece.tensor):
                shard.add(name, key, piece)
            elif piece is None and fits_file(value) and key != METADATA:
                tensors[name][key] = value
            elif name == "model":
                extra[key] = packer.pack(f"model[{key!r}]", value, pointer("model", key))
            else:
                raise CheckpointError(
                    f"{name}.safetensors: {key!r} is not a dense tensor, and the file can hold nothing else"
                )
    apart = ("callbacks", LOCAL)
    packed = {key: packer.pack(key, value, pointer(key)) for key, value in state.items() if key not in apart}
    document = {
        _TRAINER: {},
        **packed,
        "callbacks": _pack_callbacks(packer, state.get("callbacks", {}), "callbacks"),
        **({"model": extra} if extra else {}),
    }
    for key, piece in packer.pieces.items():
        shard.add(_TRAINER, key, piece)
    own = Packer()
    shard.states = _pack_callbacks(own, state.get(LOCAL, {}), LOCAL)
    if own.pieces:
        raise CheckpointError("a callback's state that differs between ranks holds a tensor that is spread over them")
    shard.tensors |= own.tensors
    return Content({**tensors, _TRAINER: packer.tensors}, document, shard)


def _pack_callbacks(packer: Packer, states: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {name: packer.pack(callback_location(name), state, pointer(where, name)) for name, state in states.items()}


def write_partial(
    folder: Path,
    content: Content,
    config_hash: str,
    keep_last: int,
    tags: Sequence[str] = (),
    is_packed: bool = False,
) -> None:
    """Write the files of a checkpoint to ``.NAME.tmp``, to be handed over to whoever commits it (``HandOver``).

    Nothing waits for the disk.

    Args:
        folder: Its final path; its name is the position.
        content: Its content, without a shard.
        config_hash: Hash of the run's config.
        keep_last: Number of newest checkpoints that the run keeps.
        tags: Tags that it is written for.
        is_packed: Whether to write one file instead of a folder; for a state that is small.

    Raises:
        OSError: It could not be written; nothing has changed.
    """
    temporary, head = beside(folder, PARTIAL), (folder.name, config_hash, keep_last, tags)
    try:
        if is_packed:
            files = {file: list(pieces) for file, pieces in _files(content)}
            manifest = _manifest(content, *head, {file: fingerprint_of(pieces) for file, pieces in files.items()})
            try:
                write_packed(temporary, manifest, files)
            except (FileNotFoundError, FileExistsError):  # the first one of a run, or a process that has died
                remove(temporary)
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_packed(temporary, manifest, files)
        else:
            remove(temporary)
            temporary.mkdir(parents=True)
            write_head(content, *head, temporary, write_files(content, temporary))
    except BaseException:
        remove(temporary)
        raise


def write_files(content: Content, folder: Path) -> dict[str, Fingerprint]:
    """Write what all ranks have in common into a folder, and return the fingerprints of the files.

    Raises:
        OSError: It could not be written.
    """
    return {file: write_file(folder / file, pieces) for file, pieces in _files(content)}


def _files(content: Content) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
    """Yield the name of every file that all ranks have in common, and its content in pieces."""
    for name, tensors in content.files.items():
        yield f"{name}.safetensors", parts(tensors)
    yield STATE, [msgspec.json.encode(content.document)]


def write_head(
    content: Content,
    name: str,
    config_hash: str,
    keep_last: int,
    tags: Sequence[str],
    folder: Path,
    written: Mapping[str, Fingerprint],
) -> None:
    """Write the manifest of a checkpoint into its folder, after all other files; for the rest see ``manifest_text``.

    Args:
        content: What it holds.
        name: Name of the checkpoint.
        config_hash: Hash of the run's config.
        keep_last: Number of newest checkpoints that the run keeps.
        tags: Tags that it is written for.
        folder: The folder that it is in for now.
        written: The fingerprints of all files.
    """
    (folder / MANIFEST).write_text(_manifest(content, name, config_hash, keep_last, tags, written))


def _manifest(
    content: Content,
    name: str,
    config_hash: str,
    keep_last: int,
    tags: Sequence[str],
    written: Mapping[str, Fingerprint],
) -> str:
    versions = {"ksuit_runner": __version__, "torch": torch.__version__}
    is_unfinished = content.document.get("unfinished") is not None
    return manifest_text(written, name, config_hash, is_unfinished, versions, keep_last, tags)


def read_newest(
    paths: PathProvider, name: str | None = None, world: World | None = None, holds: bool = False
) -> Checkpoint:
    """Read the newest intact checkpoint of a run, with a warning for every damaged one that is skipped.

    If a run that goes on has removed it meanwhile, the one that is the newest by now is taken.

    All ranks take the same one: each file is verified by one of them, and what any of them finds damaged is damaged.

    Args:
        paths: Paths of the run.
        name: Read this one only.
        world: The ranks that read it together. Of several, each gets tensors that were written in pieces as
            ``StoredTensor``, to read what it needs of them; a single process gets all as tensors.
        holds: Whether the run is kept from removing what is read: it may be another process's, and go on.

    Raises:
        CheckpointError: There is none, none that is intact, or none of this name.
    """
    world = world or World()
    existing = world.broadcast(names(paths))
    if name is not None and name not in existing:
        raise CheckpointError(f"run {paths.run_id} has no checkpoint {name[:50]!r}. {_there_are(existing)}")
    candidates, problems = existing if name is None else [name], {}
    while candidates:
        candidate, *candidates = candidates
        found, problem = _checkpoint(paths.at_checkpoint(candidate), world, holds)
        problem = next(filter(None, world.gather(problem)), None)
        if found is not None and problem is None:
            return found
        problems[candidate] = problem
        before, existing = existing, world.broadcast(names(paths))
        if name is not None and name not in existing:
            raise CheckpointError(
                f"checkpoint {name} was removed while it was read: run {paths.run_id} is going on. "
                + _there_are(existing)
            )
        if name is None and set(existing[:1]) - set(before) and len(problems) < _TRIES:
            candidates = [other for other in existing if other not in problems]
        elif world.records:
            _LOGGER.warning("checkpoint %s is damaged and skipped: %s", paths.checkpoints_dir / candidate, problem)
    if not problems:
        raise CheckpointError(f"run {paths.run_id} has no checkpoint in {paths.checkpoints_dir}: it cannot be resumed")
    listed = "".join(f"\n  {candidate}: {problem}" for candidate, problem in list(problems.items())[:_LISTED])
    raise CheckpointError(f"run {paths.run_id}: no checkpoint in {paths.checkpoints_dir} can be read{listed}")


def _there_are(existing: Sequence[str]) -> str:
    there = ", ".join(existing[:_LISTED]) + (" …" if len(existing) > _LISTED else "") if existing else "none"
    return f"There are: {there}"


def read_weights(folder: Path, label: str) -> dict[str, StoredTensor]:
    """Return the tensors by name in one file of a verified checkpoint, to be read when they are needed.

    Args:
        folder: Its folder.
        label: Name of the file without its suffix.

    Raises:
        CheckpointError: It is missing, or cannot be read.
    """
    try:
        shards = Shards(folder, [path.name for path in folder.iterdir()], folder.name)
        return _weights(folder, label, shards, _open)
    except (UnsafeFileError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _open(path: Path) -> dict[str, StoredTensor]:
    file: Any = safetensors.safe_open(path, "pt")
    return {name: FileTensor(file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def held_elsewhere(folder: Path) -> tuple[bool, set[str]]:
    """Return whether a verified checkpoint lacks frozen weights, and the names of what is no dense tensor of the model.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        document = _load(folder / STATE, lambda path: msgspec.json.decode(path.read_bytes()))
    except UnsafeFileError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return bool(document.get(BASE)), set(document.get("model", {}))


def _weights(folder: Path, label: str, shards: Shards, reader: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    stored, spread = _load(folder / f"{label}.safetensors", reader), shards.tensors.get(label, {})
    if twice := stored.keys() & spread.keys():
        raise UnsafeFileError(f"{label}.safetensors and files of the ranks both have {min(twice)[:100]!r}")
    return {**stored, **spread}


def _checkpoint(paths: PathProvider, world: World, holds: bool) -> tuple[Checkpoint | None, str | None]:
    """Return a checkpoint, or what is wrong with it."""
    progress = Progress.parse(paths.checkpoint_dir.name)
    assert progress is not None
    hold = Hold(paths.checkpoint_dir) if holds else None
    try:
        manifest, model, state, local = _read(paths.checkpoint_dir, paths.runs_dir, world)
    except UnsafeFileError as error:
        return None, str(error)
    except OSError as error:
        return None, f"it cannot be read ({error.strerror})"
    return Checkpoint(
        paths, progress, model, state, manifest["config_hash"], tuple(manifest["tags"]), local, hold
    ), None


def _read(
    folder: Path, root: Path, world: World
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[dict[str, Any], ...]]:
    """Verify and read a checkpoint; any error in reading a file counts as damage.

    Returns:
        The manifest, the model's values, the state, and the states that differ between ranks.
    """
    manifest = verify(folder, root, reads=lambda file: (rank_of(file) or 0) % world.size == world.rank)
    if missing := [file for file in (MODEL, STATE_TENSORS, STATE) if file not in manifest["files"]]:
        raise UnsafeFileError(f"{missing[0]} is missing")
    shards = Shards(folder, manifest["files"], folder.name)

    def weights(label: str) -> dict[str, Any]:
        found = _weights(folder, label, shards, safetensors.torch.load_file)
        return {name: whole(value) for name, value in found.items()} if world.size == 1 else found

    state = _load(folder / STATE, lambda path: _read_state(path, weights(_TRAINER)))
    local = shards.states()
    for file in manifest["files"]:  # callbacks read theirs later, when it is too late to choose another checkpoint
        if file.endswith(".safetensors") and file not in (MODEL, STATE_TENSORS):
            _load(folder / file, _read_header)
    return manifest, {**weights("model"), **state.pop("model", {})}, state, tuple(local)


def _read_state(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    state = unpack(msgspec.json.decode(path.read_bytes()), tensors)
    _check_shape(state)
    assert isinstance(state, dict)
    return state


def _load(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except UnsafeFileError:
        raise
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
