from functools import partial

import pytest
import torch
from test_gradient_norms import Gradients, mlp

from callbacks.gradient_spikes import GradientSpikes
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError

SPIKES = {13: 40.0, 17: 8.0, 18: float("inf"), 19: float("nan"), 26: 60.0}


class Spike(CallbackBase):
    """Multiplies a gradient of the last layer in some updates."""

    def _before_every_optimizer_step(self, update_counter):
        self.model.module.head.bias.grad.mul_(SPIKES.get(update_counter.update + 1, 1.0))


class Forget(CallbackBase):
    """Has nothing trained: a step by an infinite gradient would end it all."""

    def _before_every_optimizer_step(self, update_counter):
        for parameter in self.model.parameters():
            parameter.grad = None


def by_hand(norms, factor, decay, warmup):
    """Return the updates that spike, and how large they are, by the definition."""
    mean, found = 0.0, {}
    for seen, (update, norm) in enumerate(norms.items()):
        spikes = seen >= warmup and not norm <= factor * mean
        if spikes:
            found[update] = norm / mean if norm == norm else float("inf")
        usual = factor * mean if spikes else norm
        mean += (usual - mean) * max(1 - decay, 1 / (seen + 1))
    return found


def run(new_run, run_id, callbacks, **kwargs):
    callbacks = {"spike": Spike, **callbacks, "forget": Forget}
    return new_run(callbacks, run_id, module=mlp(), max_updates=30, freeze=["hidden.0.*"], **kwargs).train()


def test_a_spike_is_counted_and_named_with_its_update(new_run, caplog):
    callbacks = {"spikes": partial(GradientSpikes, every_n_updates=10, warmup=5, decay=0.9), "gradients": Gradients}
    whole = run(new_run, "whole", callbacks)
    names = {"head": ["head.weight", "head.bias"], "hidden.1": ["hidden.1.weight", "hidden.1.bias"]}
    for module, parameters in names.items():
        seen = whole["gradients"].seen.items()
        norms = {update: torch.cat([found[name] for name in parameters]).norm().item() for update, found in seen}
        expected = by_hand(norms, 5.0, 0.9, 5)
        assert list(expected) == (list(SPIKES) if module == "head" else [])
        for end in (10, 20, 30):
            wanted = max((size for update, size in expected.items() if end - 10 < update <= end), default=None)
            assert whole.metric(f"gradient_spikes/{module}").get(end) == (wanted and pytest.approx(wanted, rel=1e-5))
    assert whole.metric("gradient_spikes") == {10: 0, 20: 4, 30: 1}
    assert [record.getMessage().split(" is ")[0] for record in caplog.records if "gradient norm" in record.message] == [
        "update 18: the gradient norm of 'head'",
        "update 26: the gradient norm of 'head'",
    ]
    run(new_run, "cut", callbacks, stop_at=15)
    resumed = run(new_run, "cut", callbacks)
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())


@pytest.mark.parametrize(("name", "value"), [("factor", 1.0), ("decay", 1.0), ("warmup", 0)])
def test_a_number_out_of_its_range_is_an_error(new_run, name, value):
    with pytest.raises(ConfigError, match=f"{name}: .* needed, not {value}"):
        new_run({"spikes": partial(GradientSpikes, every_n_updates=10, **{name: value})})
