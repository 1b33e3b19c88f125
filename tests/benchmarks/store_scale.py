"""Finding a run among ten thousand: by its id, a prefix, its name, and the last one; and resuming it."""

import json
import sqlite3
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.resume.request import Located, locate, requested
from ksuit_runner.tracker.mlflow import MlflowTracker

from .driver import drive
from .measure import Scale, compete, seconds_of
from .result import Result


def measure(scale: Scale, folder: Path) -> Result:
    count = scale.pick(10_000, 50)
    result = Result(f"Resolving a run among {count:,}: in the output folder with its index, and in MLflow's database")
    real = drive(folder, "model=mlp", "trainer.max_updates=2", "name=the_one").paths
    _fill(folder, real.run_id, count)
    outputs = OutputPaths(folder)
    output_dir = f"output_dir={folder}"
    queries = {"an id": real.run_id, "a prefix": real.run_id[:12], "a name": "the_one", "last": "last"}
    tracker = MlflowTracker(outputs)
    contestants = {
        **{f"folder: {name}": seconds_of(partial(_locate, query, output_dir)) for name, query in queries.items()},
        **{f"database: {name}": seconds_of(partial(_find, tracker, query)) for name, query in queries.items()},
        "resume: find it and compose its config": seconds_of(partial(_resume, real.run_id, output_dir)),
    }
    contest = compete(contestants, scale.turns(9))
    result.add_contest(contest, "ms")
    for name in contest.costs:
        result.aim(name, contest.spread(name).scaled(1e3), 200.0, "ms")
    return result


def _locate(query: str, output_dir: str) -> Located:
    request = requested([f"resume={query}"])
    assert request is not None
    return locate(request, [output_dir])


def _find(tracker: MlflowTracker, query: str) -> None:
    assert tracker.find(query)


def _resume(query: str, output_dir: str) -> None:
    found = _locate(query, output_dir)
    paths = PathProvider(found.outputs.output_dir, found.run_id)
    compose_stored("resume", paths, [output_dir, "trainer.max_updates=3"])


def _fill(folder: Path, run_id: str, count: int) -> None:
    """Copy a run in the database, the index and the folder of runs; older than the real one, which stays the last."""
    ids = [UUID(int=(number + 1) * (2**128 // (count + 2))).hex for number in range(count)]
    outputs, start = OutputPaths(folder), time.time() - 1e6
    with outputs.index.open("a") as index:
        for number, copy in enumerate(ids):
            (outputs.runs_dir / copy).mkdir()
            entry = {"run_id": copy, "name": f"run-{number}", "start_time": start + number, "mode": "train"}
            index.write(json.dumps(entry) + "\n")
    database = sqlite3.connect(folder / "mlflow.db")
    _copy(database, "runs", run_id, [(copy, f"run-{i}", int(1000 * (start + i))) for i, copy in enumerate(ids)])
    database.execute("create temporary table copies (copy text)")
    database.executemany("insert into copies values (?)", [(copy,) for copy in ids])
    for table in ("tags", "params", "latest_metrics"):
        _copy_rows(database, table, run_id)
    database.commit()
    database.close()


def _copy(database: sqlite3.Connection, table: str, run_id: str, rows: Sequence[tuple[str, str, int]]) -> None:
    columns = _columns(database, table)
    given = {"run_uuid": "?", "name": "?", "start_time": "?"}
    chosen = ", ".join(given.get(column, column) for column in columns)
    order = [column for column in columns if column in given]
    values = [[dict(zip(given, row, strict=True))[column] for column in order] + [run_id] for row in rows]
    names = ", ".join(columns)
    database.executemany(f"insert into {table} ({names}) select {chosen} from {table} where run_uuid = ?", values)


def _copy_rows(database: sqlite3.Connection, table: str, run_id: str) -> None:
    """Copy what belongs to the run, for all copies at once and in the order of the primary key, which is quick."""
    columns = _columns(database, table)
    # Tags with the id and the name of the run are the copy's own.
    value = "case when value = :run then copy when key = 'mlflow.runName' then 'run-' || copy else value end"
    changed = {"run_uuid": "copy", "value": value}
    chosen = ", ".join(changed.get(column, column) for column in columns)
    rows = f"select {chosen} from {table}, copies where run_uuid = :run order by key, copy"
    database.execute(f"insert into {table} ({', '.join(columns)}) {rows}", {"run": run_id})


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [f'"{row[1]}"' if row[1] == "key" else row[1] for row in database.execute(f"pragma table_info({table})")]
