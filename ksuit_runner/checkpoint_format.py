"""What a checkpoint is on disk: writing a folder so that it is whole or not there, and reading only what is whole."""

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ksuit_runner import __version__
from ksuit_runner.counter import Progress
from ksuit_runner.durable_files import sync
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import PathProvider

_LOGGER = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
STATE = "trainer.pt"
_PARTIAL, _REPLACED = ".tmp", ".old"
PLAIN = (bool, int, float, complex, str, bytes, Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        paths: Paths of the run with ``checkpoint_dir`` set.
        progress: Position that it was written at.
        model: Weights and buffers of the model by name.
        state: ``trainer`` and ``callbacks`` (by name).
        config_hash: Hash of the config that it was written under.
    """

    paths: PathProvider
    progress: Progress
    model: dict[str, Tensor]
    state: dict[str, Any]
    config_hash: str


def write_folder(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config_hash: str
) -> None:
    """Write a checkpoint so that the folder is there with everything in it, or is not there.

    Args:
        folder: Its final place; its name is the position.
        files: Tensors by name, for each safetensors file by its name without the ending.
        state: Plain values and tensors for ``trainer.pt``.
        config_hash: Hash of the run's config.

    Raises:
        OSError: It could not be written; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            safetensors.torch.save_file(dict(tensors), temporary / f"{name}.safetensors", {"format": "pt"})
        _save_state(temporary / STATE, state)
        _write_manifest(temporary, folder.name, config_hash, is_unfinished(state))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        aside = folder.with_name(f".{folder.name}{_REPLACED}")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)  # two renames: one that a crash leaves alone is undone by `names`
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_state(path: Path, state: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides what the disk said behind a complaint of its own
                raise error.__context__ from None
            raise


def names(paths: PathProvider) -> list[str]:
    """Return the names of a run's checkpoints, newest first, whole or not."""
    if not paths.checkpoints_dir.is_dir():
        return []
    for path in paths.checkpoints_dir.glob(f".*{_REPLACED}"):
        replaced = path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED))
        if not replaced.exists():
            path.rename(replaced)
    found = [(Progress.parse(path.name), path.name) for path in paths.checkpoints_dir.iterdir()]
    whole = [(progress, name) for progress, name in found if progress is not None]
    return [name for _, name in sorted(whole, key=lambda item: item[0].update, reverse=True)]


def remove_partial(paths: PathProvider) -> None:
    """Remove what killed processes have left half written."""
    for path in paths.checkpoints_dir.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file, or None if it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _fingerprint(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def holds(folder: Path, state: Mapping[str, Any], config_hash: str) -> bool:
    """Whether a checkpoint is whole and what a state at its position would be written as.

    Under another config it holds other states; and what followed an update may have been half done when it was written.
    """
    if damage(folder) is not None:
        return False
    manifest = json.loads((folder / MANIFEST).read_text())
    return (manifest["config_hash"], manifest["unfinished"]) == (config_hash, is_unfinished(state))


def is_unfinished(state: Mapping[str, Any]) -> bool:
    """Whether a state was taken while what follows an update was half done."""
    return state.get("unfinished") is not None


def check_state(place: str, state: Any) -> None:
    """Check that a state can be read back without unpickling objects.

    Args:
        place: Where the state is from, for the message.
        state: Plain values and tensors in dicts, lists, tuples and sets.

    Raises:
        CheckpointError: It holds something else, such as a number of numpy.
    """
    if isinstance(state, dict):
        for key, value in state.items():
            check_state(place, key)
            check_state(f"{place}['{key}']", value)
    elif type(state) in (list, tuple, set):
        for value in state:
            check_state(place, value)
    elif state is not None and type(state) not in PLAIN:
        name = f"{type(state).__module__}.{type(state).__qualname__}"
        raise CheckpointError(f"{place}: a {name} cannot be kept in a checkpoint; use plain numbers, text or tensors")


def read_newest(paths: PathProvider, name: str | None = None) -> Checkpoint:
    """Read the newest checkpoint of a run that is whole, saying which damaged ones it passes over.

    Args:
        paths: Paths of the run.
        name: Read this one and no other.

    Raises:
        CheckpointError: There is none, or none that is whole.
    """
    candidates = names(paths) if name is None else [name]
    for candidate in candidates:
        problem = damage(paths.checkpoints_dir / candidate)
        if problem is None:
            return _read(paths.at_checkpoint(candidate))
        _LOGGER.warning("checkpoint %s is damaged and passed over: %s", paths.checkpoints_dir / candidate, problem)
    if not candidates:
        raise CheckpointError(f"run {paths.run_id} has no checkpoint in {paths.checkpoints_dir}: it cannot go on")
    raise CheckpointError(f"run {paths.run_id}: no checkpoint in {paths.checkpoints_dir} can be read")


def _read(paths: PathProvider) -> Checkpoint:
    folder = paths.checkpoint_dir
    progress = Progress.parse(folder.name)
    assert progress is not None
    manifest = json.loads((folder / MANIFEST).read_text())
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(paths, progress, safetensors.torch.load_file(folder / MODEL), state, manifest["config_hash"])


def _write_manifest(folder: Path, name: str, config_hash: str, unfinished: bool) -> None:
    manifest = {
        "format": FORMAT,
        "name": name,
        "config_hash": config_hash,
        "unfinished": unfinished,
        "versions": {"ksuit_runner": __version__, "torch": torch.__version__},
        "files": {path.name: _fingerprint(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _fingerprint(path: Path) -> dict[str, int]:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}
