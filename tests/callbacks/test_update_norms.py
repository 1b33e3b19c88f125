from functools import partial

import pytest
import torch
from test_gradient_norms import FailAt

from callbacks.update_norms import UpdateNorms
from ksuit_runner.models.mlp import Mlp


def test_the_norms_are_those_of_what_an_update_has_changed(new_run):
    def run(updates, **kwargs):
        torch.manual_seed(3)
        module = Mlp((1, 8, 8), (10,), hidden_dims=(16,))
        return new_run(module=module, run_id=f"of_{updates}", max_updates=updates, **kwargs).train()

    before = run(3, callbacks={}).weights
    after = run(4, callbacks={"norms": partial(UpdateNorms, every_n_updates=4)})
    for module in ("hidden.0", "head"):
        names = [f"{module}.weight", f"{module}.bias"]
        change = torch.cat([(after.weights[name] - before[name]).flatten() for name in names]).norm().item()
        weight = torch.cat([after.weights[name].flatten() for name in names]).norm().item()
        assert after.metric(f"update_norms/{module}") == {4: pytest.approx(change, rel=1e-6)}
        assert after.metric(f"update_ratios/{module}") == {4: pytest.approx(change / weight, rel=1e-6)}
    assert {"update_norms", "update_ratios"} < after.metrics() and len(after.metrics()) == 6


def test_a_run_that_fails_between_measuring_and_logging_resumes_with_the_same_norms(new_run):
    norms = partial(UpdateNorms, every_n_updates=2)
    whole = new_run({"fail": partial(FailAt, 99), "norms": norms}, "whole", max_updates=4).train()
    with pytest.raises(OSError, match="a disk has failed"):
        new_run({"fail": partial(FailAt, 2), "norms": norms}, "failing", max_updates=4).train()
    resumed = new_run({"fail": partial(FailAt, 99), "norms": norms}, "failing", max_updates=4).train()
    for key in ("update_norms/layer", "update_ratios/layer"):
        assert list(resumed.metric(key)) == [2, 4] and resumed.metric(key) == whole.metric(key)
    alone = new_run({}, "alone", max_updates=4).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in resumed.weights.items())
