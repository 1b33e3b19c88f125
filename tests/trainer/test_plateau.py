"""A schedule that steps with a metric of the run."""

from functools import partial

import pytest
from torch.optim import SGD

from callbacks.loss import Loss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import plateau

LOSS = {"loss": (Loss, {"dataset_key": "test", "every_n_updates": 2})}
OPTIONS = {
    "schedule": partial(plateau, metric="loss/test", factor=0.5, patience=0, threshold=0.5, warmup=1),
    "optimizer": partial(SGD, lr=0.1),
    "max_updates": 12,
}


class Fails(CallbackBase):
    """Fails once, when the metric has been logged and the schedule has seen it."""

    has_failed = False

    def _after_log(self, update_counter, metrics):
        if update_counter.update == 6 and not Fails.has_failed:
            Fails.has_failed = True
            raise RuntimeError("at last")


def state(maker, run_id):
    checkpoint = read_newest(maker.paths(run_id))
    return checkpoint.model, checkpoint.state["trainer"]


def test_a_plateau_is_exact_wherever_the_run_ends(maker, bits):
    callbacks = {**LOSS, "fails": (Fails, {})}
    broken = maker.run(callbacks, run_id="broken", **OPTIONS)
    with pytest.raises(RuntimeError, match="at last"):
        train(broken)
    train(maker.run(callbacks, run_id="broken", resume=True, **OPTIONS))
    whole = maker.run(LOSS, checkpoint={"every_n_updates": 1, "keep_last": 20}, **OPTIONS)
    train(whole)
    assert whole.trainer.learning_rates() == {"default": 0.1 * 0.5**5}  # of six values the first is the best
    train(maker.resumed(LOSS, update=3, **OPTIONS))
    assert bits(state(maker, "run00000-resumed")) == bits(state(maker, "run00000"))
    assert bits(state(maker, "broken")) == bits(state(maker, "run00000"))


def test_a_plateau_has_to_know_which_values_are_better(maker):
    schedule = partial(plateau, metric="accuracy/test")
    with pytest.raises(ConfigError, match="schedule.mode: higher values of 'accuracy/test' are better: write max"):
        maker.run(LOSS, schedule=schedule)
