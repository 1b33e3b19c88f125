"""MLflow's store in the output folder: an SQLite database beside the files of the runs. No server is needed."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.system.atomic_files import make_folder, sync, write_bytes
from ksuit_runner.system.lock_file import try_lock
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_file, open_stored
from ksuit_runner.tracker.mlflow_client import import_quietly
from ksuit_runner.tracker.mlflow_database import move_experiments, unsafe_and_quick

OWN_TAG = "ksuit.embedded"
"""Tag of the experiments whose artifact location is ``runs_dir``: a run's artifacts lie where the run writes them."""

_LONGEST_CREATION_S = 20.0
_migrating = threading.Lock()  # Alembic keeps what it is doing in variables of its modules
_opened: tuple[Path, tuple[int, int] | None] | None = None  # the last database that was opened, its device and inode


def exists(paths: OutputPaths) -> bool:
    """Whether the output folder has a database; creates nothing."""
    return paths.database.exists()


def uri(paths: OutputPaths) -> str:
    """Return the tracking URI of the store, whether it exists or not.

    Raises:
        TrackerError: The output folder's path has characters that MLflow would misread in a URI.
    """
    if unfit := set(str(paths.database)) & set("?%"):
        raise TrackerError(f"{paths.output_dir}: MLflow cannot store runs below a path with '{''.join(sorted(unfit))}'")
    return f"sqlite:///{paths.database}"


def make_blank(paths: OutputPaths) -> bytes:
    """Return the content of a new database for ``open_store``; nothing is written anywhere.

    Raises:
        Exception: SQLite or MLflow cannot make it in memory.
    """
    # All connections share a database in memory if its name begins with a slash, here one that MLflow does not take for
    # a folder's. The name is its own, as MLflow has one engine for each address.
    store = _new_store(f"file:%2F{uuid4().hex}?vfs=memdb&uri=true", paths)
    try:
        with closing(store.engine.raw_connection()) as connection:
            content: bytes = connection.driver_connection.serialize()
    finally:
        store.engine.dispose()
    return content


def open_store(paths: OutputPaths, timeout_s: float = 5, blank: bytes | None = None) -> str:
    """Create the database if there is none, adapt it if the output folder was moved, and return its tracking URI.

    The database that this process has opened last is taken as it is while it is the same file in the same place: every
    job of a sweep asks for it.

    The schema takes about 1 s to create. Processes that did so at once would corrupt it, so one does and the others
    wait; it gets its final name only when it is complete.

    Args:
        paths: The output folder.
        timeout_s: How long to wait for a database that another process has locked, in seconds.
        blank: What a new one contains, made ahead by ``make_blank``; made now by default.

    Raises:
        TrackerError: The output folder cannot be written to, or the database stays locked.
    """
    global _opened
    store_uri = uri(paths)
    try:
        if (found := _file(paths.database)) is not None and _opened == (paths.database, found):
            return store_uri
        make_folder(paths.output_dir)
        with _locked(paths, _LONGEST_CREATION_S + timeout_s):
            if not exists(paths):
                _create(paths, blank)
            check_file(paths.database, paths.output_dir)  # SQLite would follow a link, and wait for a pipe
            # Where this cannot be done, a run of a folder that was moved is refused by artifact_location.check.
            move_experiments(paths.database, OWN_TAG, paths.runs_dir, timeout_s)
            _opened = paths.database, _file(paths.database)
    except UnsafeFileError as error:
        raise TrackerError(f"{paths.database} {error}") from None
    except (OSError, sqlite3.Error) as error:
        raise TrackerError(f"{paths.database}: {getattr(error, 'strerror', None) or error}") from error
    return store_uri


def _file(path: Path) -> tuple[int, int] | None:
    """Return the device and the inode of what has a name, be it a link; None if that is nothing, or cannot be told."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _locked(paths: OutputPaths, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    with os.fdopen(open_stored(paths.database_lock, os.O_RDWR | os.O_CREAT), "r+") as file:
        while not try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise sqlite3.OperationalError("another process has been opening it for too long")
            time.sleep(0.02)
        yield


def _create(paths: OutputPaths, blank: bytes | None) -> None:
    if blank is not None:
        write_bytes(paths.database, blank)
        return
    unfinished = paths.database.with_name(paths.database.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # left by a process that was killed here
    with unsafe_and_quick(unfinished):
        _new_store(str(unfinished), paths).engine.dispose()
    sync(unfinished)
    os.replace(unfinished, paths.database)
    sync(paths.output_dir)


def _new_store(database: str, paths: OutputPaths) -> Any:
    """Have MLflow create the schema and its default experiment in a database, and return its store."""
    module = import_quietly("mlflow.store.tracking.sqlalchemy_store")
    with _migrating:
        # MLflow writes the location of its default experiment into the text of a statement, where every URI fits, but
        # not every path.
        return module.SqlAlchemyStore(f"sqlite:///{database}", paths.runs_dir.as_uri())
