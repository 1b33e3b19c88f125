"""How far a stored config is trusted: wholly if this user has made it on this machine, else within limits."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksuit_runner.authorship import is_signed
from ksuit_runner.check.annotation import mismatch
from ksuit_runner.compose import compose_places
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.masking import mask_addresses
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.reveal import URI_VARIABLE
from ksuit_runner.stored_files import UnsafeFileError, read_text
from ksuit_runner.targets import Trust


def trust_in_run(
    paths: PathProvider, tracker: Mapping[str, Any], overrides: Sequence[str], changes: Collection[str] = ()
) -> Trust | None:
    """Return the limits of a run's stored config, None if this user has made it on this machine.

    Args:
        paths: Paths of the run.
        tracker: Its tracker's node, with what the command line says about it.
        overrides: Overrides of the command line.
        changes: Places of the config that the command line has changed: what stands there is the user's own.

    Raises:
        ConfigError: The config is not the user's and names a place for records that the user does not.
        ResumeError: It cannot be read.
    """
    try:
        text = read_text(paths.config, paths.runs_dir)
    except UnsafeFileError as error:
        raise ResumeError(f"{paths.config} {error}") from None
    return trust_in(paths.signature, [text], paths, tracker, overrides, changes)


def trust_in(
    signature: Path,
    texts: Sequence[str],
    paths: OutputPaths,
    tracker: Mapping[str, Any],
    overrides: Sequence[str],
    changes: Collection[str] = (),
) -> Trust | None:
    """Return the limits of what stands in stored texts, None if this user has made all of them on this machine."""
    return None if is_signed(signature, texts) else limits(paths, tracker, overrides, changes)


def limits(
    paths: OutputPaths, tracker: Mapping[str, Any], overrides: Sequence[str], changes: Collection[str] = ()
) -> Trust:
    """Return the limits of a config that somebody else may have made; see ``trust_in_run``."""
    own = compose_places(overrides)
    packages = own.get("trust") or ()
    if problem := mismatch(list(packages) if not isinstance(packages, str) else packages, "list[str]"):
        raise ConfigError(f"trust: {problem}")
    for key in ("uri", "artifact_root"):  # what is recorded, and the user's password, would go there
        known = (own.tracker.get(key), os.environ.get(URI_VARIABLE))
        if tracker.get(key) not in (None, *known, *map(mask_addresses, filter(None, known))):
            raise ConfigError(
                f"tracker.{key}: the stored config was not made by you on this machine, and names {tracker[key]}. "
                f"If you trust that: tracker.{key}={tracker[key]}"
            )
    return Trust(tuple(map(str, packages)), paths.output_dir, tuple(changes))
