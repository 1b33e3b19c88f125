"""Callbacks that evaluate the same data at the same update share a pass, and none of them can tell."""

import signal
from functools import partial

import pytest
import torch
from run_maker import points
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.loss import Loss
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import evaluate, train
from ksuit_runner.errors import StopTraining
from ksuit_runner.testing import tiny_run

EVERY = {"dataset_key": "test", "every_n_updates": 2}


class Counted:
    """Points with noise; counts how often they are read."""

    def __init__(self, length):
        self.inputs, self.targets = torch.randn(length, 4, generator=torch.Generator().manual_seed(1)), torch.arange(3)
        self.length, self.read = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read += 1
        return self.inputs[index] + 0.1 * torch.rand(4), self.targets[index % 3]


class Noisy(nn.Module):
    """Draws also in evaluation mode, and counts its forward passes there."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, inputs):
        self.calls += not self.training
        return self.layer(inputs) + 0.1 * torch.randn(len(inputs), 3)


class Draws(DatasetCallback):
    """Logs what it draws for the batches and after a forward pass; it may be one that shares outputs."""

    def _process_batch(self, batch, models):
        self.drawn = getattr(self, "drawn", 0.0) + torch.rand(()).item()
        for model in models.values():
            self.drawn += self.trainer.predict(batch[0], model).sum().item() + torch.rand(()).item()

    def _process_results(self, update_counter):
        self.writer.add_scalar(f"drawn/{self.name}", self.drawn + torch.rand(()).item())
        self.drawn = 0.0


class SharesAndDraws(Draws):
    shares_batch = True


class Spoils(Draws):
    """Changes its batch in every way."""

    def _process_batch(self, batch, models):
        super()._process_batch(batch, models)
        assert self.trainer.batch_size(batch) == len(batch[1])
        batch[0].zero_()
        batch.pop()


class Fails(Draws):
    """Fails at an update, in the second batch or with the results; knows how many batches it has seen."""

    at, error = None, ZeroDivisionError("broken")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batches = 0

    def _process_batch(self, batch, models):
        self.batches += 1
        if self.at == (self.trainer.counter.update, "batch") and len(batch[1]) == 1:
            raise self.error
        super()._process_batch(batch, models)

    def _process_results(self, update_counter):
        if self.at == (update_counter.update, "results"):
            raise self.error
        super()._process_results(update_counter)

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


def made(maker, run_id, callbacks, num_workers=0, **kwargs):
    """Make a run with a model that draws, and two weights to evaluate."""
    torch.manual_seed(0)
    run = maker.run(callbacks, run_id=run_id, model=Noisy(), num_workers=num_workers, max_updates=4, **kwargs)
    torch.manual_seed(1)
    run.trainer.add_evaluation_model("ema", Noisy().eval())
    return run


def recorded(run):
    return {(key, step): value for key, step, value in points(run)}


def trained(maker, run_id, callbacks, **kwargs):
    run = made(maker, run_id, callbacks, **kwargs)
    train(run)
    return recorded(run)


ALL = {
    "accuracy": (Accuracy, EVERY),
    "spoils": (Spoils, EVERY),
    "shares": (SharesAndDraws, {**EVERY, "max_batches": 1}),
    "draws": (Draws, EVERY),
    "loss": (Loss, {"dataset_key": "test", "every_n_updates": 1}),
    "again": (SharesAndDraws, EVERY),
}


class SpoiledAccuracy(Accuracy):
    """A subclass of one that shares, which changes its batch."""

    logs = ("spoiled*",)

    def _process_batch(self, batch, models):
        super()._process_batch((batch[0].zero_(), batch[1]), models)

    def metric_key(self, metric, weights):
        return f"spoiled_{super().metric_key(metric, weights)}"


class SpoilingLoss(nn.Module):
    """Changes the outputs in place, which training allows."""

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs.mul_(-1), targets)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, SpoilingLoss])
def test_neither_a_subclass_nor_the_loss_changes_what_others_see(maker, loss):
    given = {"spoiled": (SpoiledAccuracy, EVERY), "loss": (Loss, EVERY), "accuracy": (Accuracy, EVERY)}
    together = trained(maker, "together", given, loss=loss())
    for name, callback in given.items():
        alone = trained(maker, name, {name: callback}, loss=loss())
        assert alone and alone.items() <= together.items()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_result_is_that_of_the_callback_alone(maker, num_workers):
    alone = {}
    for name, callback in ALL.items():
        alone |= trained(maker, name, {name: callback})
    assert trained(maker, "all", ALL, num_workers=num_workers) == alone
    assert trained(maker, "reversed", dict(reversed(ALL.items()))) == alone


def small(tmp_path, callbacks, test):
    """Make a run without workers, of data that count how often they are read."""
    run_id = f"run{len(list(tmp_path.iterdir()))}"
    makers = {name: partial(cls, **given) for name, (cls, given) in callbacks.items()}
    data = {"train": Counted(12), "test": test}
    return tiny_run(tmp_path, makers, run_id, datasets=data, module=Noisy(), batch_size=6, max_updates=2)


def test_data_are_read_once_and_outputs_computed_once_for_those_that_share(tmp_path):
    def cost(callbacks):
        test = Counted(7)
        run = small(tmp_path, callbacks, test).run
        evaluate(run)
        return test.read, run.trainer.model.module.calls

    pair = {"accuracy": (Accuracy, EVERY), "loss": (Loss, EVERY)}
    assert cost(pair) == (7, 1)
    assert cost({**pair, "draws": (Draws, EVERY), "other": (Loss, {**EVERY, "batch_size": 7})}) == (14, 3)


@pytest.mark.parametrize("where", ["batch", "results"])
@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), SystemExit(3)])
def test_an_error_of_one_leaves_the_others_as_they_are(maker, bits, name, where, error):
    def callbacks(at=None):
        failing = type("Fails", (Fails,), {"at": at, "error": error})
        sound = type("Sound", (Fails,), {})
        return {
            "first": (failing if name == "first" else sound, EVERY),
            "second": (failing if name == "second" else sound, EVERY),
            "third": (sound, EVERY),
        }

    whole = made(maker, "whole", callbacks())
    train(whole)
    run = made(maker, "failed", callbacks((4, where)))
    with pytest.raises(type(error)) as raised:
        train(run)
    assert f"raised in callback '{name}', hook periodic_callback" in raised.value.__notes__
    unfinished = read_newest(maker.paths("failed")).state["unfinished"]
    assert unfinished["done"] == ([] if name == "first" else ["first.periodic_callback"])
    resumed = made(maker, "failed", callbacks(), resume=True)
    train(resumed)
    assert recorded(resumed) == recorded(whole)
    assert {item.batches for item in resumed.hooks.callbacks.values()} == {2 * 2}
    assert bits(resumed.trainer.model.tensors()) == bits(whole.trainer.model.tensors())


@pytest.mark.parametrize("names", [("one", "stops", "other"), ("stops", "one", "other")])
def test_one_that_ends_training_in_a_batch_does_so_at_its_turn(maker, names):
    failing = type("Stops", (Fails,), {"at": (2, "batch"), "error": StopTraining("enough")})
    alone = trained(maker, "alone", {"one": (Draws, EVERY)})["drawn/one", 2]
    run = made(maker, "stops", {name: (failing if name == "stops" else Draws, EVERY) for name in names})
    train(run)
    assert run.counter.stopped_by == ["stops"] and run.counter.update == 2
    assert {key for key, _ in recorded(run)} == {"drawn/one", "drawn/other"}
    assert recorded(run)["drawn/one", 2] == alone


def test_a_broken_sample_is_the_error_of_those_that_read_it(tmp_path):
    class Broken(Counted):
        def __getitem__(self, index):
            if index == 6:
                raise ZeroDivisionError("sample 6 is broken")
            return super().__getitem__(index)

    run = small(tmp_path, {"few": (Draws, {**EVERY, "max_batches": 2}), "all": (Draws, EVERY)}, Broken(7))
    run.run.data.eval_batch_size = 3
    with pytest.raises(ZeroDivisionError) as raised:
        run.train()
    assert "raised in callback 'all', hook periodic_callback" in raised.value.__notes__
    assert run.metrics() == {"drawn/few"}


def test_a_signal_in_a_pass_ends_the_run_and_the_resume_repeats_it(maker):
    class Interrupts(Draws):
        armed = True

        def _process_batch(self, batch, models):
            super()._process_batch(batch, models)
            if self.armed and self.trainer.counter.update == 2:
                self.data_container.interruption.signal = signal.SIGTERM

    def callbacks(**armed):
        return {"one": (Fails, EVERY), "two": (type("I", (Interrupts,), armed), EVERY), "three": (Fails, EVERY)}

    whole = trained(maker, "whole", callbacks(armed=False))
    run = made(maker, "stopped", callbacks())
    train(run)
    assert run.counter.update == 2 and not recorded(run)
    resumed = made(maker, "stopped", callbacks(armed=False), resume=True)
    train(resumed)
    assert recorded(resumed) == whole and resumed.hooks.callbacks["three"].batches == 4
