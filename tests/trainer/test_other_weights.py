"""Optimizers and modules that have other weights for evaluation than for training."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.schedule import constant


class Averaging(SGD):
    """Trains some weights and evaluates their mean; counts in its groups. To switch there and back is not exact."""

    def __init__(self, params, lr=0.3):
        super().__init__(params, lr)
        self.defaults |= {"k": 0, "trains": False}
        for group in self.param_groups:
            group.update(k=0, trains=False)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            assert group["trains"]
            group["k"] += 1
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", parameter.detach().clone())
                mean.lerp_(parameter.detach(), 1 / group["k"])

    @torch.no_grad()
    def _switch(self, trains):
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["trains"] != trains and "mean" in self.state[parameter]:
                    mean = self.state[parameter]["mean"]
                    parameter.sub_(mean).mul_(1 / 3 if trains else 0).mul_(3).add_(mean)
            group["trains"] = trains

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)


class Merging(nn.Linear):
    """Merges an adapter into its weights for evaluation, and takes it out again, as far as rounding allows."""

    merged = False

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.adapter = nn.Parameter(torch.full(self.weight.shape, 0.3))

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += (-0.1 if mode else 0.1) * self.adapter.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, self.weight if self.merged else self.weight + 0.1 * self.adapter, self.bias)


class Weights(DatasetCallback):
    """Keeps the weights that are evaluated."""

    def _process_batch(self, batch, models):
        self.seen = {name: item.clone() for name, item in models[""].module.state_dict().items()}
        self.trainer.predict(batch[0], models[""])

    def _process_results(self, update_counter):
        pass


def end(maker, run_id, callbacks=None, updates=6, resume=False, **options):
    torch.manual_seed(0)
    options = {"model": nn.Sequential(Merging(4, 3)), "optimizer": partial(Averaging, lr=0.3), **options}
    run = maker.run(callbacks, run_id=run_id, resume=resume, max_updates=6, **options)
    run.counter.end_update = updates
    train(run)
    return run


def test_evaluation_sees_the_other_weights_and_changes_no_bit(maker, bits):
    plain = end(maker, "plain")
    watched = end(maker, "watched", {"weights": (Weights, {"dataset_key": "test", "every_n_updates": 2})})
    seen, ended = watched.hooks.callbacks["weights"].seen, watched.trainer.model.module.state_dict()
    optimizer = watched.trainer.optimizer
    assert bits(ended) == bits(plain.trainer.model.module.state_dict())
    assert bits(watched.trainer.state_dict()["optimizer"]) == bits(plain.trainer.state_dict()["optimizer"])
    torch.testing.assert_close(seen["0.bias"], optimizer.state[watched.trainer.model.module[0].bias]["mean"])
    assert not seen["0.bias"].equal(ended["0.bias"])
    assert not watched.trainer.model.module[0].merged


def test_what_it_counts_in_its_groups_survives_a_resume_and_a_fork(maker, bits):
    end(maker, "whole")
    first = end(maker, "cut", updates=3)
    end(maker, "cut", resume=True)
    whole, cut = (read_newest(maker.paths(run_id)) for run_id in ("whole", "cut"))
    assert bits(cut.model) == bits(whole.model)
    assert bits(cut.state["trainer"]["optimizer"]) == bits(whole.state["trainer"]["optimizer"])
    fork = maker.trainer(model=nn.Sequential(Merging(4, 3)), optimizer=partial(Averaging, lr=0.7))
    fork.load_state_dict(first.trainer.state_dict(), same_settings=False)
    (group,) = fork.optimizer.param_groups
    assert (group["k"], group["trains"], group["initial_lr"]) == (3, True, 0.7)


def test_a_schedule_free_optimizer_trains_as_by_hand_while_it_is_evaluated(maker, bits):
    schedulefree = pytest.importorskip("schedulefree")
    make = partial(schedulefree.AdamWScheduleFree, lr=0.05, warmup_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    run = maker.run(
        {"weights": (Weights, {"dataset_key": "test", "every_n_updates": 1})},
        model=deepcopy(model),
        optimizer=make,
        schedule=constant,
        max_updates=6,
    )
    batches, forward = [], run.trainer.update.forward
    run.trainer.update.forward = lambda part, *more: batches.append(part.batch) or forward(part, *more)
    train(run)
    optimizer = make(model.parameters())
    optimizer.train()
    for inputs, targets in batches:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step(), optimizer.zero_grad()
    assert bits(run.trainer.model.module.state_dict()) == bits(model.state_dict())
    optimizer.eval()
    assert bits(run.hooks.callbacks["weights"].seen) == bits(model.state_dict())
