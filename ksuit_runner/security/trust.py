"""The trust in a stored config: full if this user has made it on this machine, else within limits."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from ksuit_runner.config.check.mismatch import mismatch
from ksuit_runner.config.compose import compose_locations
from ksuit_runner.config.schema import objects_beside
from ksuit_runner.config.targets import Trust
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.security.authorship import is_signed
from ksuit_runner.security.masking import mask_addresses
from ksuit_runner.security.reveal import URI_VARIABLE


def trust_in(
    signature: Path,
    texts: Sequence[str],
    paths: OutputPaths,
    tracker: Mapping[str, Any],
    overrides: Sequence[str],
    changes: Collection[str] = (),
) -> Trust | None:
    """Return the limits of what stands in stored texts, None if this user has made all of them on this machine.

    Args:
        signature: Their signature.
        texts: The texts, as they were read: a second read could give another one.
        paths: The output folder.
        tracker: The tracker's node, with what the command line says about it.
        overrides: Overrides of the command line.
        changes: Config paths that the command line has changed, whose values are the user's own.

    Raises:
        ConfigError: The texts are not the user's, and name a tracking store that the user does not.
    """
    return None if is_signed(signature, texts) else limits(paths, tracker, overrides, changes)


def limits(
    paths: OutputPaths, tracker: Mapping[str, Any], overrides: Sequence[str], changes: Collection[str] = ()
) -> Trust:
    """Return the limits of a config that somebody else may have made; see ``trust_in``."""
    own = compose_locations(overrides)
    packages: Any = own.get("trust") or []
    packages = list(packages) if isinstance(packages, ListConfig) else packages
    if problem := mismatch(packages, "list[str]"):
        raise ConfigError(problem, path="trust")
    beside = [f"tracker.{name}" for name in objects_beside("tracker", tracker)]
    nodes = {"tracker": tracker, **{path: tracker[path.partition(".")[2]] for path in beside}}
    for path in (f"{above}.{key}" for above in nodes for key in ("uri", "artifact_root", "entity")):
        # Records, and the user's password, would be sent there.
        above, _, key = path.rpartition(".")
        named = nodes[above].get(key)
        known = (OmegaConf.select(own, path), os.environ.get(URI_VARIABLE))
        if named not in (None, *known, *map(mask_addresses, filter(None, known))):
            raise ConfigError(
                f"the stored config was not made by you on this machine, and names {named}. "
                f"If you trust that: {path}={named}",
                path=path,
            )
    return Trust(tuple(map(str, packages)), paths.output_dir, tuple(changes))
