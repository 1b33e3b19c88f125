from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from ksuit_runner.distributed.world import World
from ksuit_runner.engine.closing import RefusedError, closing
from ksuit_runner.engine.last_state import Place, Standing, common_place
from ksuit_runner.engine.log_agreement import mean_of_ranks
from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.engine.run import Phase
from ksuit_runner.errors import AliveError, CheckpointError, ConfigError, Interrupted, PeerError, TakenOverError
from ksuit_runner.tracker.base import EndStatus

NAN = float("nan")


class Scripted(World):
    """Rank 0 of two; the other one answers as scripted."""

    size = 2

    def __init__(self, *answers, is_complete=True):
        self.answers, self.is_complete, self.failures = list(answers), is_complete, []

    def gather(self, value):
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return [value, answer]

    def fail(self, error):
        self.failures.append(error)

    def recover(self):
        return self.is_complete


@pytest.mark.parametrize("other", [["the log of update 3", 1], 5, None, [1, 2, 3]])
def test_ranks_at_different_places_are_an_error(other):
    with pytest.raises(PeerError, match="rank 0: the log of update 4, rank 1: "):
        Scripted(other).exchange("the log of update 4", 1)


def ended(text, is_own=True, trace=None, exit_status=1):
    return ["the end", {"text": text, "is_own": is_own, "trace": trace, "exit_status": exit_status}]


def test_of_two_errors_that_of_the_first_rank_is_reported():
    mine = ValueError("mine")
    assert Meeting(Scripted(ended("yours"))).settle(mine) is mine
    assert Meeting(Scripted(["the end", None])).settle(mine) is mine


def test_the_own_error_of_another_rank_is_reported_with_its_exit_status():
    world = Scripted(ended("trainer.device: there is none", exit_status=2))
    reported = Meeting(world).settle(PeerError("rank 1 has failed"))
    assert str(reported) == "rank 1: trainer.device: there is none"
    assert (reported.exit_status, reported.is_reported) == (2, False)


def test_ranks_that_come_apart_meet_once_more():
    world = Scripted(PeerError("rank 1 has failed"), ended("at last"))
    assert "at last" in str(Meeting(world).settle(None)) and len(world.failures) == 1


def test_where_a_rank_is_lost_each_reports_its_own_error():
    mine, lost = ValueError("mine"), PeerError("rank 1 does not answer")
    assert Meeting(Scripted(is_complete=False)).settle(mine) is mine
    assert Meeting(Scripted(is_complete=False)).settle(lost) is lost and not lost.is_reported
    other = Scripted(is_complete=False)
    other.rank = 1
    assert Meeting(other).settle(lost) is lost and lost.is_reported  # rank 0 says so


def standing(phase, done="", earliest=0, update=4):
    return Standing(update, phase, list(done), earliest, True, False, None)


@pytest.mark.parametrize(
    ("standings", "place"),
    [
        ([standing("BETWEEN", "abc"), standing("BETWEEN", "abc")], Place(Phase.BETWEEN)),
        ([standing("AFTER_UPDATE", "ab"), standing("AFTER_UPDATE", "abc")], Place(Phase.AFTER_UPDATE, 2)),
        ([standing("BETWEEN", "abc"), standing("AFTER_UPDATE", "a")], Place(Phase.AFTER_UPDATE, 1)),
        ([standing("BETWEEN", "abc", earliest=2), standing("AFTER_UPDATE", "a")], None),
        ([standing("BETWEEN", "abc"), standing("AFTER_UPDATE", "ac")], None),
        ([standing("BETWEEN", "abc"), standing("BETWEEN", "abc", update=5)], None),
        ([standing("AT_END", "a"), standing("AFTER_UPDATE", "a")], None),
        ([standing("BETWEEN"), standing("END")], None),
    ],
)
def test_ranks_stand_where_the_one_does_that_has_done_least(standings, place):
    assert common_place(standings) == common_place(standings[::-1]) == place


def test_a_metric_is_the_mean_over_the_ranks_that_have_it():
    found = mean_of_ranks([{"same": 0.1, "nan": NAN, "mean": 1.0}, {"same": 0.1, "nan": NAN, "mean": 2.0, "only": 3.0}])
    assert list(found) == ["same", "nan", "mean", "only"]
    assert (found["same"], found["mean"], found["only"]) == (0.1, 1.5, 3.0) and found["nan"] != found["nan"]


def test_a_rank_that_was_interrupted_for_the_second_time_has_killed_the_run(tmp_path, caplog):
    closed = []
    record = SimpleNamespace(close=lambda status, never_began: closed.append(status))
    trainer = SimpleNamespace(data_container=SimpleNamespace(close=nullcontext))
    outcome = RunOutcome("run00000", tmp_path)
    with closing(record, trainer, outcome, Meeting(Scripted(Interrupted(15), is_complete=False))):
        pass
    assert closed == [outcome.status] == [EndStatus.KILLED]
    assert (outcome.exit_status, outcome.error, caplog.text) == (143, None, "")


@pytest.mark.parametrize(
    ("error", "never_began"),
    [
        *((ConfigError("no"), True), (CheckpointError("no"), True), (AliveError("no"), True)),
        *((TakenOverError("no"), False), (RuntimeError("no"), False)),
    ],
)
def test_a_run_never_began_if_what_it_was_asked_to_do_is_refused(tmp_path, error, never_began):
    closed = []
    record = SimpleNamespace(status_before=EndStatus.KILLED, close=lambda *told: closed.append(told))
    trainer = SimpleNamespace(data_container=SimpleNamespace(close=nullcontext))
    outcome = RunOutcome("run00000", tmp_path)
    with closing(record, trainer, outcome, Meeting(World())):
        raise RefusedError from error
    assert closed == [(EndStatus.KILLED, never_began)]
    assert outcome.exit_status == (1 if isinstance(error, RuntimeError) else 2)
