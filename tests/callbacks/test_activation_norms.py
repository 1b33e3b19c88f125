import math
from functools import partial

import pytest
import torch
from test_gradient_norms import FailAt
from torch import nn

from callbacks.activation_norms import ActivationNorms
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError


def blocks():
    torch.manual_seed(5)
    block = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)]
    return nn.Sequential(nn.Flatten(), nn.ModuleDict({"x": block[0]})["x"], block[1], nn.Linear(64, 10))


class Predicts(CallbackBase):
    """Uses the model right before each forward pass, between the two of the callback."""

    def _before_every_accumulation_step(self, update_counter, batch):
        self.trainer.predict(batch[0] * 9, self.model)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_norms_are_those_of_the_outputs_in_the_forward_pass_of_training(new_run, parts):
    module, seen = blocks(), []
    module[2].register_forward_hook(lambda module, _, outputs: seen.append((torch.is_grad_enabled(), outputs.detach())))
    callbacks = {"norms": partial(ActivationNorms, every_n_updates=2), "predicts": Predicts}
    options = {"max_updates": 3, "accumulation_steps": parts, "activation_checkpointing": ["1"]}
    run = new_run(callbacks, module=module, **options).train()
    outputs = torch.cat([output for is_training, output in seen if is_training][parts : 2 * parts])
    assert run.metric("activation_norms/2.1")[2] > 0
    assert {key.partition("/")[2] for key in run.metrics()} == {"0", "1.0", "1.1", "1.2", "2.0", "2.1", "2.2", "3"}
    wanted = outputs.double().square().mean().sqrt().item()
    assert run.metric("activation_norms/2.2") == {2: pytest.approx(wanted, rel=1e-6)}
    assert sum(len(item._forward_hooks) for item in run.model.module.modules()) == 1  # the one above


def test_a_resumed_run_logs_the_same_and_training_is_undisturbed(new_run):
    norms = partial(ActivationNorms, match=["1", "3"], every_n_updates=2)

    def run(run_id, callbacks):
        return new_run(callbacks, run_id, module=blocks(), max_updates=4, accumulation_steps=2)

    whole = run("whole", {"fail": partial(FailAt, 99), "norms": norms}).train()
    with pytest.raises(OSError, match="a disk has failed"):
        run("failing", {"fail": partial(FailAt, 2), "norms": norms}).train()
    resumed = run("failing", {"fail": partial(FailAt, 99), "norms": norms}).train()
    assert whole.metrics() == {"activation_norms/1", "activation_norms/3"}
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())
    alone = run("alone", {}).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_an_update_that_is_skipped_leaves_no_hooks(new_run):
    class Broken(nn.Linear):
        passes = 0

        def forward(self, inputs):
            self.passes += torch.is_grad_enabled()
            return super().forward(inputs.flatten(1)) * (float("nan") if self.passes == 2 else 1)

    module = nn.Sequential(Broken(64, 10))
    callbacks = {"norms": partial(ActivationNorms, every_n_updates=2)}
    run = new_run(callbacks, module=module, max_updates=4, nan_loss="skip").train()
    assert [math.isnan(value) for value in run.metric("activation_norms/0").values()] == [True, False]
    assert not module[0]._forward_hooks


def test_a_module_that_is_never_called_is_an_error_that_says_what_to_write(new_run):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module.add_module("spare", nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ConfigError, match=r"callbacks.norms.match: 'spare' is a ModuleList, .* write 'spare.{}'"):
        new_run({"norms": partial(ActivationNorms, match=["spare"], every_n_updates=1)}, module=module)


class InDouble(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs.flatten(1).double())


def test_outputs_in_double_precision_have_norms_too(new_run):
    callbacks = {"activation_norms": partial(ActivationNorms, every_n_updates=1)}
    run = new_run(callbacks, module=InDouble(64, 10, dtype=torch.float64), max_updates=1).train()
    assert run.metric("activation_norms")[1] > 0
