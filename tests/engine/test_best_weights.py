"""After training, the weights of the best checkpoint are evaluated, and the run does not notice."""

import logging
import signal
from functools import partial

import pytest
import torch
from run_maker import points
from torch import nn

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.ema import Ema
from callbacks.loss import Loss
from ksuit_runner import run
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import evaluate, train
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import PathProvider
from ksuit_runner.trainer.sgd import SgdTrainer

TEST = {"dataset_key": "test", "weights_of": "best"}


class Score(PeriodicCallback):
    """Logs a score that is best at one update."""

    def __init__(self, best, **kwargs):
        super().__init__(every_n_updates=2, **kwargs)
        self.best = best

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar("accuracy/x", -abs(update_counter.update - self.best))


class Scaled(nn.Module):
    """Squared error with a trained factor and a buffer that changes at every update."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, outputs, targets):
        if self.training:
            self.seen += 1
        return self.factor.square() * nn.functional.cross_entropy(outputs, targets) + self.seen


class Carries(SgdTrainer):
    """Carries a number that is part of the loss."""

    carried = 0.0

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        if torch.is_grad_enabled():
            self.carried += 1.0
        return {"total": losses["total"] + self.carried}, outputs

    def extra_state(self):
        return {"carried": self.carried}

    def load_extra_state(self, state):
        self.carried = state["carried"]


class Interrupts(DatasetCallback):
    """Asks the run to end while it evaluates."""

    armed = True

    def _process_batch(self, batch, models):
        assert list(models) == ["best", "best/ema"]
        if self.armed:
            self.data_container.interruption.signal = signal.SIGTERM

    def _process_results(self, update_counter):
        self.writer.add_scalar("interrupts", 1.0)


class Odd(BestCheckpoint):
    """Asks for a state that a checkpoint lacks."""

    def load_state_dict(self, state_dict):
        self.odd = state_dict["odd"]


def callbacks(best=4, **more):
    watched = {"metric_key": "accuracy/x", "tag": "best"}
    return {"ema": (Ema, {}), "score": (Score, {"best": best}), "keeps": (BestCheckpoint, watched), **more}


def values(run):
    return {(key, step): value for key, step, value in points(run)}


def normalized():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def schedule_free():
    return pytest.importorskip("schedulefree").AdamWScheduleFree


@pytest.mark.parametrize("best", [4, 8, 0])
@pytest.mark.parametrize("optimizer", [lambda: torch.optim.AdamW, schedule_free], ids=["adamw", "schedule_free"])
def test_the_weights_are_those_of_the_tagged_checkpoint(maker, bits, best, optimizer):
    given = {"loss": Scaled(), "trainer_class": Carries, "optimizer": partial(optimizer(), lr=0.1)}

    def run(run_id, callbacks, **kwargs):
        torch.manual_seed(0)
        return maker.run(callbacks, run_id=run_id, model=normalized(), **{**given, "loss": Scaled()}, **kwargs)

    plain, tested = run("plain", callbacks(best)), run("tested", callbacks(best, test=(Loss, TEST)))
    for item in (plain, tested):
        train(item)
    name = read_tags(maker.paths("tested"))["best"]
    assert name == f"E{max(best, 2) // 3}_U{max(best, 2)}_S{max(best, 2) * 6}"
    stored = run("tested", callbacks(best, now=(Loss, {"dataset_key": "test"})), resume=True)
    checkpoint = read_newest(maker.paths("tested"), name)
    stored.trainer.model.load(checkpoint.model)
    stored.trainer.load_state_dict(checkpoint.state["trainer"])
    stored.hooks.states.resume(checkpoint, stored.trainer.model, may_have_more=True)
    stored.log_writer.prefix = "eval/"
    evaluate(stored)
    expected = {key: stored.log_writer.summary[f"eval/{key}"].last for key in ("loss/test", "loss/test/ema")}
    found = {key: value for key, value in values(tested).items() if key[0].startswith("loss")}
    assert found == {("loss/test/best", 8): expected["loss/test"], ("loss/test/best/ema", 8): expected["loss/test/ema"]}
    final = [read_newest(maker.paths(run_id)) for run_id in ("plain", "tested")]
    assert bits(final[0].model) == bits(final[1].model)
    assert bits(final[0].state["trainer"]) == bits(final[1].state["trainer"])
    assert bits(plain.hooks.callbacks["ema"].models["ema"].tensors()) == bits(
        tested.hooks.callbacks["ema"].models["ema"].tensors()
    )


def test_an_interrupted_one_is_repeated_by_the_resume(maker):
    def more(armed):
        return {"loss": (Loss, TEST), "in": (type("In", (Interrupts,), {"armed": armed}), TEST), "end": (Loss, TEST)}

    train(whole := maker.run(callbacks(**more(False)), run_id="whole"))
    train(run := maker.run(callbacks(**more(True)), run_id="stopped"))
    assert not run.is_finished and not any(key.startswith("loss") for key, _ in values(run))
    assert names(maker.paths("stopped"))[0] == "E2_U8_S48"
    train(resumed := maker.run(callbacks(**more(False)), run_id="stopped", resume=True))
    assert values(resumed) == values(whole) and resumed.is_finished


def test_without_such_a_checkpoint_nothing_is_evaluated(maker, caplog):
    caplog.set_level(logging.WARNING, "ksuit_runner")
    run = maker.run({"test": (Loss, TEST)}, max_updates=2)
    train(run)
    assert not values(run) and run.is_finished
    assert "callbacks.test.weights_of: no checkpoint has the tag 'best', and nothing is evaluated" in caplog.text


def test_a_best_checkpoint_that_is_damaged_is_named_and_costs_only_its_evaluation(maker, caplog):
    run = maker.run(callbacks())
    train(run)
    best = run.checkpoint_writer.read_tagged("best")
    file = best.paths.checkpoint_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run.checkpoint_writer.read_tagged("best") is None
    assert "model.safetensors" in caplog.text


def test_a_run_without_updates_has_one_evaluation_of_each_kind(maker):
    test = {"loss": (Loss, {"dataset_key": "test"}), "test": (Loss, TEST)}
    run = maker.run(callbacks(**test), max_updates=0)
    train(run)
    found = values(run)
    assert found["loss/test", 0] == found["loss/test/best", 0] and len(found) == 5


@pytest.mark.parametrize("interval", [{"every_n_epochs": 1}, {"at_start": True}])
def test_an_interval_beside_it_is_refused(maker, interval):
    with pytest.raises(ConfigError, match="weights_of: it means one evaluation after training"):
        maker.run({"test": (Loss, {**TEST, **interval})})


def test_a_fork_of_the_best_checkpoint_has_it_as_its_best(tmp_path):
    given = [f"output_dir={tmp_path}", "tracker=noop", "model=linear", "data.batch_size=512", "default_callbacks=none"]
    first = run([*given, "callbacks=[accuracy,best_checkpoint,test_accuracy]", "trainer.max_epochs=1"])
    fork = run([given[0], f"fork={first.run_id}@best", "trainer.max_epochs=2", "optimizer.lr=0"])
    assert read_tags(PathProvider(tmp_path, fork.run_id))["best"].startswith("E1_")
    assert fork.metrics["accuracy/test/best"].last_step == 4


def test_a_state_that_a_callback_cannot_load_is_an_error_that_names_it(maker):
    train(maker.run(callbacks(), max_updates=2))
    with pytest.raises(ResumeError, match="^callbacks.keeps: .* than an Odd can load. KeyError: 'odd'"):
        maker.run({**callbacks(), "keeps": (Odd, {"metric_key": "accuracy/x"})}, resume=True)
