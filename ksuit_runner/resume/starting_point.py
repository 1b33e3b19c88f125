"""Finds what a new run takes its weights from, before torch is imported, and fixes it in its config."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ksuit_runner.checkpoint.folders import damage, names, weights_file
from ksuit_runner.checkpoint.manifest import MANIFEST, is_common
from ksuit_runner.config.check.initialization import FILE_TYPES, NODE, Initialization, initialization_of
from ksuit_runner.config.factory import Factory
from ksuit_runner.errors import CheckpointError, ConfigError, files_explained
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.resume.reference import Reference, find_run

_FROM = f"{NODE}.from"


@dataclass(frozen=True)
class StartingPoint:
    """The file that holds the weights which a run begins with.

    Attributes:
        file: The file.
        checkpoint: Paths of the checkpoint that it is part of, if it is of a run.
    """

    file: Path
    checkpoint: PathProvider | None = None

    @property
    def text(self) -> str:
        """What is stored of it: ``RUN_ID@CHECKPOINT/WEIGHTS``, or the path of the file."""
        if self.checkpoint is None:
            return str(self.file)
        return f"{self.checkpoint.run_id}@{self.checkpoint.checkpoint_dir.name}/{self.file.stem}"

    def checksum(self) -> str:
        """Return the SHA-256 of the file; if ranks hold pieces of the weights, of the manifest with all checksums."""
        is_whole = self.checkpoint is None or all(map(is_common, os.listdir(self.file.parent)))
        file = self.file if is_whole else self.file.with_name(MANIFEST)
        found = file.stat()
        return _checksum(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=32)
def _checksum(file: Path, size: int, time: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def with_starting_point(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checked config whose ``initialize`` says what exactly it is, as ``last`` and ``@best`` will move on.

    Raises:
        KsuitError: There is no such run, checkpoint or file, or it is not the one with the ``checksum``.
    """
    settings = initialization_of(config)
    if settings is None:
        return config
    with files_explained():
        found = find_starting_point(config, settings)
        checksum = check_checksum(settings, found)
    return {**config, NODE: {**config[NODE], "from": found.text, "checksum": checksum}}


def check_checksum(settings: Initialization, found: StartingPoint) -> str:
    """Return the checksum of a starting point.

    Raises:
        ConfigError: It is not the one with the ``checksum`` that the config has.
    """
    checksum = found.checksum()
    if settings.checksum not in (None, checksum):
        raise ConfigError(
            f"{found.file} is not the file that is meant: its SHA-256 is {checksum}, and not {settings.checksum}",
            path=f"{NODE}.checksum",
        )
    return checksum


def find_starting_point(config: Mapping[str, Any], settings: Initialization) -> StartingPoint:
    """Find the file that holds the weights which a run begins with.

    Raises:
        KsuitError: It does not exist.
    """
    if settings.is_file:
        file = Path(os.path.expanduser(settings.source)).absolute()
        if not file.is_file():
            raise ConfigError(f"there is no file {file}", path=_FROM)
        return StartingPoint(file)
    outputs = OutputPaths(config["output_dir"])
    if Path(settings.source).is_file():
        raise ConfigError(f"a file of weights ends in {', '.join(FILE_TYPES)}, not {settings.source}", path=_FROM)

    def look_up(query: str) -> str | None:
        from ksuit_runner.resume.fetch_run import fetch_by

        return fetch_by(Factory(config), outputs, query)

    return weights_named(find_run(_FROM, settings.source, outputs, look_up), _FROM, is_known=bool(settings.checksum))


def weights_named(found: Reference, path: str, is_known: bool = False) -> StartingPoint:
    """Find the file that holds the weights which a reference names, in an intact checkpoint.

    Args:
        found: The reference.
        path: Config path that it was written for, for messages.
        is_known: Whether the checksum of the file is known, which says more than that the checkpoint is intact.

    Raises:
        KsuitError: There is no such checkpoint, none that is intact, or no such weights.
    """
    name, weights = found.checkpoint_and_weights()
    existing = names(found.paths) if name is None else [name]
    damages = ((item, damage(found.paths.checkpoints_dir / item)) for item in existing)
    intact = existing[0] if existing and is_known else next((item for item, bad in damages if bad is None), None)
    if intact is None:
        raise CheckpointError(f"{found.text}: run {found.run_id} has no intact checkpoint", path=path)
    checkpoint = found.paths.at_checkpoint(intact)
    return StartingPoint(weights_file(checkpoint.checkpoint_dir, weights or "model", path), checkpoint)
