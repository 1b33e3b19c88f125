"""What is called by the clock shows something, and does nothing that a resume or another rank would do elsewhere."""

from functools import partial

import pytest

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import KsuitError, StopTraining
from ksuit_runner.testing import tiny_run


class Timed(CallbackBase):
    """Does something at every update."""

    next_time = 0.0

    def __init__(self, act, **kwargs):
        super().__init__(**kwargs)
        self.act, self.seen = act, []

    def _timed_callback(self, update_counter):
        self.seen.append(update_counter.update)
        self.act(self)


def stop(callback):
    raise StopTraining("it is late")


@pytest.mark.parametrize(
    "act",
    [
        lambda callback: callback.writer.add_scalar("time", 1.0),
        lambda callback: callback.checkpoint_writer.request("late"),
        stop,
    ],
    ids=["logs", "requests", "stops"],
)
def test_what_depends_on_the_time_is_refused(tmp_path, act):
    run = tiny_run(tmp_path, {"timed": partial(Timed, act)}, max_updates=3)
    with pytest.raises(KsuitError, match=r"callbacks\.timed: _timed_callback logs, stops training or requests"):
        run.train()


def test_it_is_called_between_updates_once_its_time_has_come(tmp_path):
    assert tiny_run(tmp_path, {"timed": partial(Timed, bool)}, max_updates=3).train()["timed"].seen == [1, 2, 3]
    later = partial(Timed, lambda callback: setattr(callback, "next_time", float("inf")))
    assert tiny_run(tmp_path, {"timed": later}, "later", max_updates=3).train()["timed"].seen == [1]
