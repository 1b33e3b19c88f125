"""Only updates compute in training mode, and a callback can change neither modes nor gradients."""

import logging
from itertools import count

import pytest
import torch
from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import KsuitError
from ksuit_runner.trainer.modes import Modes

IN_TRAINING = ("before_every_update", "before_every_accumulation_step", "before_every_backward")
WITH_GRADIENTS = ("track_after_accumulation_step", "before_every_optimizer_step")
LATER = [hook for hook in (*HOOKS, "periodic_callback") if hook not in (*IN_TRAINING, "on_exception")]


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode, whoever trains the rest."""

    def train(self, mode=True):
        return super().train(False)


def normalized(frozen=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), frozen(8), nn.Linear(8, 3))


class In(PeriodicCallback):
    """Does something in one hook, which a test hands over."""

    def __init__(self, hook, do, **kwargs):
        super().__init__(every_n_updates=1, **kwargs)
        self.do, self.calls = do, 0
        setattr(self, f"_{hook}", self.call)

    def call(self, **arguments):
        self.calls += 1
        self.do(self, **arguments)

    for _hook in (*HOOKS, "periodic_callback"):
        locals()[f"_{_hook}"] = lambda self, **arguments: None

    def _track_after_update_step(self, update_counter):
        self.writer.add_scalar(f"logged/{self.name}", 0.0)  # so that there is something to react to


class Evaluates(DatasetCallback):
    """Goes through a dataset, without a result."""

    def _process_batch(self, batch, models):
        self.trainer.predict(batch[0], models[""])

    def _process_results(self, update_counter):
        pass


def end(maker, callbacks, run_id, **options):
    """Return weights and buffers at the end of a run of two epochs in two accumulation steps."""
    run = maker.run(callbacks, run_id=run_id, **{"max_epochs": 2, "accumulation_steps": 2, **options})
    train(run)
    assert all(callback.calls for callback in run.hooks.callbacks.values() if isinstance(callback, In))
    return run.trainer.model.tensors()


def forward(self, **arguments):
    self.model(torch.ones(5, 4))
    self.trainer.predict(torch.ones(5, 4))
    self.model.module[1](torch.ones(5, 8))


def backward(self, **arguments):
    with torch.enable_grad():
        self.model(torch.ones(5, 4)).square().sum().backward()


def modes(self, **arguments):
    self.model.eval()
    self.model.train()
    self.model.module[2].eval()


@pytest.mark.parametrize("do", [forward, modes])
@pytest.mark.parametrize("hook", LATER)
def test_what_a_hook_computes_or_sets_changes_no_bit(maker, bits, hook, do):
    plain = end(maker, {}, "plain", model=normalized(Frozen))
    watched = end(maker, {"in": (In, {"hook": hook, "do": do})}, "watched", model=normalized(Frozen))
    assert bits(watched) == bits(plain)


@pytest.mark.parametrize("hook", [hook for hook in (*LATER, *IN_TRAINING[:2]) if hook not in WITH_GRADIENTS])
def test_gradients_that_a_hook_leaves_behind_change_no_bit(maker, bits, hook):
    options = {"accumulation_steps": 1}
    plain = end(maker, {}, "plain", **options)
    assert bits(end(maker, {"in": (In, {"hook": hook, "do": backward})}, "watched", **options)) == bits(plain)


def of_losses(self, losses, **arguments):
    losses["total"].backward(retain_graph=True)


@pytest.mark.parametrize(
    ("hook", "do", "steps"),
    [
        ("track_after_accumulation_step", backward, 1),
        ("before_every_optimizer_step", backward, 1),
        ("before_every_accumulation_step", backward, 2),
        ("before_every_backward", of_losses, 2),
    ],
)
def test_gradients_that_are_added_to_those_of_an_update_are_an_error(maker, hook, do, steps):
    run = maker.run({"in": (In, {"hook": hook, "do": do})}, accumulation_steps=steps)
    with pytest.raises(KsuitError, match=f"callbacks.in: it leaves gradients behind in {hook}"):
        train(run)


def test_gradients_may_be_computed_separately_and_changed_on_purpose(maker, monkeypatch):
    def aside(self, **arguments):
        parameter = next(self.model.parameters())
        with torch.enable_grad():
            torch.autograd.grad(parameter.square().sum(), parameter)

    def scale(self, **arguments):
        for parameter in self.model.parameters():
            parameter.grad.mul_(0.0)

    hook = "before_every_optimizer_step"
    train(maker.run({"in": (In, {"hook": hook, "do": aside})}, run_id="aside"))
    run = maker.run({"in": (In, {"hook": hook, "do": scale})}, run_id="scaled", optimizer=torch.optim.SGD)
    before = {name: tensor.clone() for name, tensor in run.trainer.model.tensors().items()}
    train(run)
    assert all(tensor.equal(before[name]) for name, tensor in run.trainer.model.tensors().items())
    monkeypatch.setattr("ksuit_runner.engine.hooks.graphs_built", count().__next__)  # as without torch's number
    train(maker.run({"in": (In, {"hook": hook, "do": aside})}, run_id="still"))
    with pytest.raises(KsuitError, match="callbacks.in: it leaves gradients behind"):
        train(maker.run({"in": (In, {"hook": hook, "do": scale})}, run_id="refused"))


def test_an_update_computes_in_training_mode_and_hooks_see_which(maker):
    seen, inside = {}, []
    model = normalized(Frozen)
    model.register_forward_pre_hook(lambda module, _: inside.append([item.training for item in module.modules()]))
    see = {
        hook: (In, {"hook": hook, "do": lambda self, **_: seen.setdefault(self.name, set()).add(self.model.training)})
        for hook in (*LATER, *IN_TRAINING)
    }
    end(maker, see, "seen", model=model)
    assert seen == {hook: {hook in IN_TRAINING} for hook in see}
    assert set(map(tuple, inside)) == {(True, True, True, True, False, True)}


def test_a_mode_that_is_set_before_an_update_lasts(maker):
    def freeze(self, **arguments):
        self.model.module[1].eval()

    run = maker.run({"in": (In, {"hook": "before_every_update", "do": freeze})}, model=normalized())
    train(run)
    assert run.trainer.model.module[1].num_batches_tracked == 0
    assert run.trainer.model.module[3].num_batches_tracked > 0


def test_modules_in_evaluation_mode_are_trained_and_reported(maker, caplog):
    caplog.set_level(logging.INFO)
    run = maker.run(model=normalized(Frozen).eval())
    train(run)
    assert run.trainer.model.module[1].num_batches_tracked > 0
    assert run.trainer.model.module[3].num_batches_tracked == 0
    assert "switched to training mode: module\n" in caplog.text


def test_a_part_in_evaluation_mode_is_named(caplog):
    caplog.set_level(logging.INFO)
    model = nn.ModuleDict({"backbone": normalized(Frozen).eval(), "head": nn.Linear(3, 3)})
    Modes(model, nn.MSELoss()).start()
    assert "switched to training mode: backbone\n" in caplog.text


def test_modules_that_are_replaced_are_found_again():
    model = normalized()
    switch = Modes(model, nn.MSELoss())
    switch.start()
    switch.evaluate()
    model[1] = nn.BatchNorm1d(8)
    switch.find_modules()
    assert not any(module.training for module in model.modules())
    switch.train()
    assert all(module.training for module in model.modules())


class Merged(nn.Linear):
    """Merges its weights for evaluation, as adapters do."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_a_custom_train_method_is_called_after_evaluation(maker):
    model = nn.Sequential(Merged(4, 3))
    model_was = []
    model[0].register_forward_pre_hook(lambda module, _: model_was.append((torch.is_grad_enabled(), module.merged)))
    train(maker.run({"e": (Evaluates, {"dataset_key": "test", "every_n_updates": 2})}, model=model))
    assert set(model_was) == {(True, False), (False, True)}


class Sampled(nn.Dropout):
    """Drops in evaluations as well."""

    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize("make", [nn.Dropout, Sampled, lambda p: torch.jit.script(nn.Dropout(p))])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_an_evaluation_is_what_eval_makes_of_the_modules_and_ends_as_it_began(make):
    model, frozen = nn.Sequential(nn.Linear(4, 50), make(0.5), nn.BatchNorm1d(50)), nn.BatchNorm1d(3).eval()
    model.add_module("frozen", nn.Sequential(nn.Linear(50, 3), frozen))
    switch, x = Modes(model, nn.MSELoss()), torch.randn(9, 4)
    modes = [module.training for module in model.modules()]
    expected = {module: module.training for module in model.eval().modules()}
    torch.manual_seed(0)
    y = model(x)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    with switch.evaluation([], []):
        torch.manual_seed(0)
        assert {module: module.training for module in model.modules()} == expected
        assert torch.equal(model(x), y)
    assert [module.training for module in model.modules()] == modes
