from functools import partial

import pytest
import torch
from torch import nn

from callbacks.nan_watch import NanWatch
from ksuit_runner.errors import ConfigError, LossError
from ksuit_runner.trainer.sgd import SgdTrainer


class Breaks(torch.autograd.Function):
    """Returns its input, and makes NaNs in the backward pass."""

    @staticmethod
    def forward(context, inputs):
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


class Layer(nn.Module):
    """A layer with a ReLU in place, which breaks in its second forward or backward pass."""

    def __init__(self, breaks):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.act = nn.ReLU(inplace=True)
        self.breaks = breaks
        self.passes = 0

    def forward(self, inputs):
        self.passes += torch.is_grad_enabled()
        outputs = self.act(self.inner(inputs))
        if self.passes >= 2 and self.breaks == "forward":
            outputs = outputs + (outputs * 1e38 * 1e38)
        return Breaks.apply(outputs) if self.passes >= 2 and self.breaks == "backward" else outputs


def net(breaks):
    torch.manual_seed(2)
    blocks = [Layer(None), Layer(breaks), Layer(None)]
    return nn.Sequential(nn.Flatten(), nn.Sequential(*blocks), nn.Linear(64, 10))


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ksuit_runner.callbacks.watch"]


def test_the_module_that_breaks_the_forward_pass_is_named_before_the_run_fails(new_run, caplog):
    run = new_run({"watch": partial(NanWatch, every_n_updates=10)}, module=net("forward"), max_updates=4)
    with pytest.raises(LossError, match="the loss of update 2 is nan"):
        run.train()
    first, before = "the output of '1.1'", "the output of '1.1.act'"
    assert said(caplog) == [f"update 2: {first} is the first that is not finite, right after {before}"]
    assert not any(module._forward_hooks for module in run.model.modules())


@pytest.mark.parametrize("parts", [1, 2])
def test_the_module_that_breaks_the_backward_pass_is_named_at_the_interval(new_run, caplog, parts):
    watch, options = partial(NanWatch, every_n_updates=parts), {"max_updates": 2, "accumulation_steps": parts}
    module = net("backward")
    module[1][1].passes = 1 - parts  # breaks in the first part of the second update
    new_run({"watch": watch}, module=module, **options).train()
    first, before = "the gradient of the output of '1.1.act'", "the gradient of the output of '1.1'"
    assert said(caplog) == [f"update 2: {first} is the first that is not finite, right after {before}"]


def test_a_batch_that_is_not_finite_is_named(new_run, caplog):
    class Broken:
        def __len__(self):
            return 72

        def __getitem__(self, index):
            return torch.full((1, 8, 8), float("inf")), index % 10

    with pytest.raises(LossError):
        new_run({"watch": partial(NanWatch, every_n_updates=9)}, datasets={"train": Broken()}, max_updates=2).train()
    assert said(caplog) == ["update 1: the batch is the first that is not finite"]


def test_a_loss_that_makes_it_of_finite_outputs_is_told_apart(new_run, caplog):
    class Logarithm(SgdTrainer):
        def training_step(self, batch, model):
            losses, outputs = super().training_step(batch, model)
            return {"total": losses["total"] + (outputs.sum() * 0).log()}, outputs

    with pytest.raises(LossError):
        new_run({"watch": partial(NanWatch, every_n_updates=9)}, trainer_class=Logarithm, max_updates=2).train()
    assert said(caplog) == ["the outputs of all modules are finite: the loss is what is not"]


def test_training_is_undisturbed(new_run):
    options = {"max_updates": 4, "accumulation_steps": 2, "activation_checkpointing": ["1.{}"]}
    watched = new_run({"watch": partial(NanWatch, every_n_updates=2)}, "on", module=net(None), **options).train()
    alone = new_run({}, "off", module=net(None), **options).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in watched.weights.items())


def test_a_pattern_that_matches_nothing_is_an_error(new_run):
    with pytest.raises(ConfigError, match=r"callbacks.watch.match: 'layr' matches no module. Did you mean 'layer'"):
        new_run({"watch": partial(NanWatch, match=["layr"], every_n_updates=1)})
