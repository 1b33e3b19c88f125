"""Checks where a store says that a run's files are: it may name any folder, and only expected ones are trusted."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ksuit_runner.errors import TrackerError

_NETWORK = frozenset(
    {
        *("mlflow-artifacts", "http", "https", "s3", "r2", "gs", "wasb", "wasbs", "abfs", "abfss", "adl", "dbfs"),
        *("hdfs", "viewfs", "ftp", "sftp", "oss", "b2"),
    }
)  # no others: `runs:` and `models:` lead to further addresses, and so to any folder


def folder(artifact_uri: str) -> Path | None:
    """Return an artifact root as a folder of this machine; None for one that is reached over the network."""
    parts = urlsplit(artifact_uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else artifact_uri)


def check(artifact_uri: str, own: Collection[Path], allowed: str | None, has_network: bool) -> None:
    """Check an artifact root before anything is copied to it or deleted there.

    Args:
        artifact_uri: Location that the store names.
        own: Folders that the run's artifacts may have in the output folder.
        allowed: Another folder or URI that the user allows.
        has_network: Whether files may be on another machine.

    Raises:
        TrackerError: It is none of these.
    """
    here = folder(artifact_uri)
    if here is None:
        is_named = allowed is not None and _is_below(artifact_uri, allowed)
        is_right = is_named or (has_network and urlsplit(artifact_uri).scheme.lower() in _NETWORK)
    else:
        named = folder(allowed) if allowed is not None else None
        is_own = here in own and not (here.is_symlink() or here.parent.is_symlink())
        is_right = is_own or (named is not None and here.resolve().is_relative_to(named.resolve()))
    if not is_right:
        raise TrackerError(
            f"the store has the run's files in {artifact_uri}, outside of its folder. "
            f"To allow that: tracker.artifact_root={artifact_uri}"
        )


def _is_below(uri: str, root: str) -> bool:
    return ".." not in unquote(uri) and (uri == root or uri.startswith(root.rstrip("/") + "/"))
