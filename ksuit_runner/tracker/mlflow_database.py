"""What is done to MLflow's databases behind its API, where that has no way: all of it is in this file.

Each function has a guard for a version of MLflow in which what it relies on is gone. The caller then gets what the API
gives by itself, and a test of the function fails.
"""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# What the statements below name; where a table lacks one of these columns, none of them is executed.
_COLUMNS = {
    "runs": {"run_uuid", "artifact_uri"},
    "logged_models": {"model_id", "artifact_location"},
    "experiments": {"experiment_id", "artifact_location"},
    "experiment_tags": {"experiment_id", "key"},
}


def move_run(uri: str, run_id: str, folder: Path) -> bool:
    """Change where MLflow looks for the files of a run, which its API cannot.

    A run that was registered after its start has its files under another id than MLflow's.

    Args:
        uri: Tracking URI of a database that is used without a server.
        run_id: MLflow's id of the run.
        folder: Where its files are.

    Returns:
        Whether the tables are the known ones; if not, nothing is changed.
    """
    return _move(uri, "runs", "UPDATE runs SET artifact_uri = :folder WHERE run_uuid = :id", run_id, folder)


def move_model(uri: str, model_id: str, folder: Path) -> bool:
    """Change where MLflow looks for the files of a logged model, which its API cannot; see ``move_run``.

    Without it, a checkpoint would have to be copied to be shown as a model.
    """
    statement = "UPDATE logged_models SET artifact_location = :folder WHERE model_id = :id"
    return _move(uri, "logged_models", statement, model_id, folder)


def _move(uri: str, table: str, statement: str, id: str, folder: Path) -> bool:
    from sqlalchemy import create_engine, inspect, text

    engine = create_engine(uri)
    try:
        tables = inspect(engine)
        if not _are_known([table], lambda table: [column["name"] for column in tables.get_columns(table)]):
            return False
        with engine.begin() as connection:
            connection.execute(text(statement), {"folder": str(folder), "id": id})
    finally:
        engine.dispose()
    return True


def move_experiments(database: Path, tag: str, folder: Path, timeout_s: float) -> bool:
    """Change where MLflow looks for the files of experiments and of their runs, which its API cannot.

    Without it, an output folder that was moved or copied could not be used any more.

    Args:
        database: SQLite database.
        tag: Tag of the experiments.
        folder: Their artifact location from now on.
        timeout_s: How long to wait while another process has the database locked, in seconds.

    Returns:
        Whether the tables are the known ones; if not, nothing is changed.

    Raises:
        sqlite3.Error: The database is damaged, locked, or cannot be written to.
    """
    here = str(folder)
    with closing(sqlite3.connect(database, timeout=timeout_s)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")  # one that cannot be written to is found out here
        if not _are_known(_COLUMNS, lambda table: _columns(connection, table)):
            return False
        tagged = "experiment_id IN (SELECT experiment_id FROM experiment_tags WHERE key = ?)"
        query = f"SELECT DISTINCT artifact_location FROM experiments WHERE {tagged}"
        for (there,) in connection.execute(query, (tag,)).fetchall():
            if there == here:
                continue
            for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, there)
            )
    return True


def _are_known(tables: Iterable[str], columns: Callable[[str], Iterable[str]]) -> bool:
    return all(_COLUMNS[table] <= set(columns(table)) for table in tables)


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]


def limit_lock_wait(uri: str, timeout_s: float) -> None:
    """Have MLflow wait for a locked SQLite database as long as for a server, instead of 20 s for every statement.

    MLflow has no setting for it. The end of a run would wait for minutes while another process holds the database.

    Args:
        uri: Tracking URI of the database.
        timeout_s: How long to wait, in seconds.
    """
    try:
        engine = _engine(uri)
    except (ImportError, AttributeError):  # another version of MLflow: it waits for its 20 s
        return
    engine.update_execution_options(ksuit_busy_ms=math.ceil(timeout_s * 1000))


@cache
def _engine(uri: str) -> Any:
    """Return the engine of a database, of which MLflow keeps one for each address; asking MLflow takes 30 ms."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = SqlAlchemyStore(uri, ".").engine
    event.listen(engine, "before_cursor_execute", _limit_wait, retval=True)
    return engine


def _limit_wait(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    if statement.startswith("PRAGMA busy_timeout"):  # as MLflow sends it with every session
        statement = f"PRAGMA busy_timeout = {connection.get_execution_options()['ksuit_busy_ms']}"
    return statement, parameters


@contextmanager
def unsafe_and_quick(database: Path) -> Iterator[None]:
    """Let SQLite write a new file without waiting for the disk at each of MLflow's migrations.

    What counts is the file in the end, which the caller syncs. The schema then takes 1.4 s and not 3.7 s on an SSD. It
    uses only what SQLAlchemy documents; without it the file would be the same.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connected(connection: object, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):  # there may be other databases in this process
            _, _, file = connection.execute("PRAGMA database_list").fetchone()
            if file and database.samefile(file):
                connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)
