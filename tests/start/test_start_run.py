"""What the command says of ranks that have ended."""

import pickle

import pytest

from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import LostRankError, PeerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.start.start_run import RankEnd, outcome_of
from ksuit_runner.start.supervised_rank import Report
from ksuit_runner.start.supervisor import Ended
from ksuit_runner.tracker.base import EndStatus

ID = "a" * 32


def report(error, status=EndStatus.FAILED):
    outcome = RunOutcome(ID, "folder", status, error=error)
    return Report(isinstance(error, PeerError), pickle.dumps(RankEnd(outcome, error)))


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_leaves_without_a_word_is_what_is_reported(silent, status, tmp_path, capsys):
    # Through os._exit, in a library: the others only know that it is not there any more.
    blames = report(PeerError("rank 1 does not answer"))
    ended = Ended([None, blames] if silent == 0 else [blames, None], [status, 1] if silent == 0 else [1, status])
    outcome = outcome_of(ended, ID, OutputPaths(tmp_path))
    assert f"rank {silent} has ended with exit status {status} before the run has" in capsys.readouterr().err
    assert isinstance(outcome.error, LostRankError)
    assert outcome.exit_status == max(status, 1)
    assert outcome.status == (EndStatus.KILLED if silent == 0 else EndStatus.FAILED)


def test_an_error_says_more_than_a_rank_that_has_left(tmp_path):
    ended = Ended([report(ValueError("the cause")), None], [1, 1])
    assert isinstance(outcome_of(ended, ID, OutputPaths(tmp_path)).error, ValueError)
