from functools import partial

import pytest
import torch
from test_gradient_norms import FailAt, mlp
from torch import nn

from callbacks.gradient_noise_scale import GradientNoiseScale
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer

NOISE = partial(GradientNoiseScale, decay=0.5, every_n_updates=2)
OPTIONS = {"max_updates": 6, "accumulation_steps": 3}


class ByHand(CallbackBase):
    """Estimates it from the gradient of every part, computed by itself from its samples."""

    found: dict[int, float]

    def _before_training(self, update_counter):
        self.found, self.parts, self.averages = {}, [], None

    def _before_every_accumulation_step(self, update_counter, batch):
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        self.parts.append(torch.cat([item.flatten() for item in gradients]).double())

    def _track_after_update_step(self, update_counter):
        parts, self.parts = torch.stack(self.parts), []
        if update_counter.update % 2:
            return
        small, large = 72 / 3, 72
        square, whole = parts.square().sum(1).mean(), parts.mean(0).square().sum()
        signal = (large * whole - small * square) / (large - small)
        variance = (square - whole) / (1 / small - 1 / large)
        new = torch.stack([variance, signal])
        self.averages = new if self.averages is None else (self.averages + new) / 2
        self.found[update_counter.update] = (self.averages[0] / self.averages[1]).item()


class Jitter(torch.autograd.Function):
    """Draws random numbers in the backward pass."""

    @staticmethod
    def forward(context, outputs):
        return outputs.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * (0.5 + torch.rand_like(gradient))


class Jittering(SgdTrainer):
    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, lambda inputs: Jitter.apply(model(inputs)))
        return losses, outputs


def test_it_is_estimated_from_the_gradients_of_the_parts_and_of_the_whole(new_run):
    run = new_run({"noise": NOISE, "hand": ByHand}, module=mlp(), **OPTIONS).train()
    assert list(run["hand"].found) == [2, 4, 6]
    assert run.metric("gradient_noise_scale") == pytest.approx(run["hand"].found, rel=1e-4)


def test_a_sum_as_the_loss_gives_the_same_scale(new_run):
    def run(run_id, reduction, lr):
        options = {"loss": nn.CrossEntropyLoss(reduction=reduction), "optimizer": partial(torch.optim.SGD, lr=lr)}
        return new_run({"noise": NOISE}, run_id, **OPTIONS, **options).train().metric("gradient_noise_scale")

    assert run("sum", "sum", 0.5 / 72) == pytest.approx(run("mean", "mean", 0.5), rel=1e-3)


def test_float16_gives_about_the_same_scale(new_run):
    single, half = (
        new_run({"noise": NOISE}, precision, precision=precision, **OPTIONS).train().metric("gradient_noise_scale")
        for precision in ("float32", "float16")
    )
    assert half == pytest.approx(single, rel=0.02)


def test_it_recovers_the_noise_of_gradients_that_are_known(new_run):
    """The gradient of a linear loss is the mean of its inputs: here of 30 numbers around 1 with a variance of 25."""

    class Known:
        def __init__(self):
            self.inputs = 1 + 5 * torch.randn(4320, 30, generator=torch.Generator().manual_seed(0))

        def __len__(self):
            return 4320

        def __getitem__(self, index):
            return self.inputs[index], 0.0

    class Mean(nn.Module):
        def forward(self, outputs, targets):
            return outputs.mean()

    options = {"loss": Mean(), "module": nn.Linear(30, 1, bias=False), "accumulation_steps": 8, "max_updates": 60}
    noise = partial(GradientNoiseScale, decay=0.999, every_n_updates=1)
    run = new_run({"noise": noise}, datasets={"train": Known()}, **options).train()
    assert run.metric("gradient_noise_scale")[60] == pytest.approx(30 * 25 / 30, rel=0.15)


def test_a_run_that_fails_between_measuring_and_logging_resumes_with_the_same_scale(new_run):
    def run(run_id, callbacks):
        options = {"trainer_class": Jittering, "activation_checkpointing": ["hidden.0"], **OPTIONS}
        return new_run(callbacks, run_id, module=mlp(), **options)

    whole = run("whole", {"fail": partial(FailAt, 99), "noise": NOISE}).train()
    with pytest.raises(OSError, match="a disk has failed"):
        run("failing", {"fail": partial(FailAt, 4), "noise": NOISE}).train()
    resumed = run("failing", {"fail": partial(FailAt, 99), "noise": NOISE}).train()
    assert resumed.metric("gradient_noise_scale") == whole.metric("gradient_noise_scale")
    alone = run("alone", {}).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, {}, r"it compares parts of a batch: set trainer.accumulation_steps=2"),
        ({"decay": 1.0}, {"accumulation_steps": 2}, "decay: a number between 0 and 1 is needed, not 1.0"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(new_run, arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"noise": partial(GradientNoiseScale, every_n_updates=1, **arguments)}, **options)
