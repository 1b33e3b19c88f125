from functools import partial

import pytest
import torch
from torch import nn

from callbacks.gradient_norms import GradientNorms
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.mlp import Mlp


class Gradients(CallbackBase):
    """Keeps the gradients of every update, as one vector for each parameter."""

    seen: dict[int, dict[str, torch.Tensor]]

    def _before_training(self, update_counter):
        self.seen = {}

    def _before_every_optimizer_step(self, update_counter):
        named = self.model.module.named_parameters()
        self.seen[update_counter.update + 1] = {
            name: item.grad.to_dense().flatten().clone() for name, item in named if item.grad is not None
        }


class FailAt(CallbackBase):
    """Fails after an update."""

    def __init__(self, update, **kwargs):
        super().__init__(**kwargs)
        self.update = update

    def _track_after_update_step(self, update_counter):
        if update_counter.update == self.update:
            raise OSError("a disk has failed")


def mlp():
    torch.manual_seed(3)
    return Mlp((1, 8, 8), (10,), hidden_dims=(16, 8))


def test_the_norms_are_those_of_the_gradients_of_each_module(new_run):
    callbacks = {"norms": partial(GradientNorms, every_n_updates=2), "gradients": Gradients}
    run = new_run(callbacks, module=mlp(), max_updates=4, freeze=["hidden.1.*"], clip_norm=0.01).train()
    for update in (2, 4):
        seen = run["gradients"].seen[update]
        for key, names in {
            "gradient_norms/hidden.0": ["hidden.0.weight", "hidden.0.bias"],
            "gradient_norms/head": ["head.weight", "head.bias"],
            "gradient_norms": list(seen),
        }.items():
            wanted = torch.cat([seen[name] for name in names]).norm().item()
            assert run.metric(key)[update] == pytest.approx(wanted, rel=1e-6)
    assert run.metrics() == {
        "gradient_norms",
        "gradient_norms/hidden.0",
        "gradient_norms/head",
    }  # not of the frozen one


def test_sparse_gradients_count_with_the_sums_of_their_rows(new_run):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(17, 10, sparse=True)

        def forward(self, inputs):
            return self.table((inputs.flatten(1) * 16).long()).sum(1)

    callbacks = {"norms": partial(GradientNorms, every_n_updates=1), "gradients": Gradients}
    run = new_run(callbacks, module=Sparse(), max_updates=1).train()
    wanted = run["gradients"].seen[1]["table.weight"].norm().item()
    assert run.metric("gradient_norms/table") == {1: pytest.approx(wanted, rel=1e-5)}


def test_a_run_that_fails_between_measuring_and_logging_resumes_with_the_same_norms(new_run):
    norms = partial(GradientNorms, every_n_updates=2)
    whole = new_run({"fail": partial(FailAt, 99), "norms": norms}, "whole", max_updates=6).train()
    failing = new_run({"fail": partial(FailAt, 4), "norms": norms}, "failing", max_updates=6)
    with pytest.raises(OSError, match="a disk has failed"):
        failing.train()
    resumed = new_run({"fail": partial(FailAt, 99), "norms": norms}, "failing", max_updates=6).train()
    assert list(resumed.metric("gradient_norms/layer")) == [2, 4, 6]
    assert resumed.metric("gradient_norms/layer") == whole.metric("gradient_norms/layer")
    alone = new_run({}, "alone", max_updates=6).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in resumed.weights.items())


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(new_run):
    with pytest.raises(ConfigError, match=r"callbacks.norms.match: 'layers' matches no .* Did you mean 'layer'"):
        new_run({"norms": partial(GradientNorms, match=["layers"], every_n_updates=1)})
