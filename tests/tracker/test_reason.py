"""What a person reads when MLflow or its database fails: the line that says why."""

import sqlite3

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy import exc

from ksuit_runner.errors import TrackerError
from ksuit_runner.tracker.mlflow_client import explained

LOCKED = "MLflow: (sqlite3.OperationalError) database is locked"


def locked(add_msg=None):
    error = exc.OperationalError("INSERT INTO runs", {"id": 1}, sqlite3.OperationalError("database is locked"))
    if add_msg:
        error.add_detail(add_msg)
    return error


def flushed():
    hint = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    return exc.OperationalError(f"{hint}\nx", {}, sqlite3.OperationalError("database is locked"))


def rolled_back():
    return exc.PendingRollbackError(
        "This Session's transaction has been rolled back due to a previous exception during flush. To begin a new "
        "transaction with this Session, first issue Session.rollback(). Original exception was: "
        f"{locked()}"
    )


def in_mlflow():
    try:
        raise locked("(raised as a result of Query-invoked autoflush; consider a session.no_autoflush block)")
    except exc.OperationalError as error:
        text = f"(raised as a result of Query-invoked autoflush; ...)\n{error}"
        made = MlflowException(text)
        made.__context__ = error
        return made


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (locked(), LOCKED),
        (flushed(), LOCKED),
        (rolled_back(), LOCKED),
        (in_mlflow(), LOCKED),
        (MlflowException(f"(raised as a result of x)\n\n{LOCKED.removeprefix('MLflow: ')}\n[SQL: x]"), LOCKED),
        (MlflowException("\n  first line\nsecond line"), "MLflow: first line"),
        (RuntimeError(), "MLflow: RuntimeError()"),
        (
            MlflowException("(Background on this error at: https://x)"),
            "MLflow: (Background on this error at: https://x)",
        ),
    ],
)
def test_the_useful_line_is_shown(error, said):
    @explained
    def fails():
        raise error

    with pytest.raises(TrackerError) as raised:
        fails()
    assert str(raised.value) == said
