from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from callbacks.ema import Ema
from callbacks.loss import Loss
from ksuit_runner.trainer.sgd import SgdTrainer


class TwoLosses(SgdTrainer):
    """Names the parts of its loss."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        size = outputs.square().mean()
        return {"total": losses["total"] + size, "size": size}, outputs


def test_every_sample_counts_the_same_in_a_last_smaller_batch(new_run, digits):
    # 359 samples in batches of 100, the last one has 59.
    run = new_run({"ema": Ema, "loss": partial(Loss, dataset_key="test", every_n_epochs=1)}, max_updates=20).train()
    test = digits["test"]
    assert run.metrics() == {"loss/test", "loss/test/ema"}
    for key, model in (("loss/test", run.model), ("loss/test/ema", run["ema"].models["ema"])):
        each = cross_entropy(model(test.inputs), test.targets, reduction="none").double()
        assert run.metric(key) == {20: pytest.approx(each.mean().item(), rel=1e-6)}
        of_batches = torch.stack([part.mean() for part in each.split(100)]).mean().item()
        assert run.metric(key)[20] != pytest.approx(of_batches, rel=1e-6)


def test_other_losses_have_names(new_run, digits):
    loss = partial(Loss, dataset_key="test", every_n_updates=4)
    run = new_run({"loss": loss}, trainer_class=TwoLosses, max_updates=8).train()
    assert run.metrics() == {"loss/test", "loss_size/test"}
    assert list(run.metric("loss/test")) == list(run.metric("loss_size/test")) == [4, 8]
    size = run.model(digits["test"].inputs).square().mean().item()
    assert run.metric("loss_size/test")[8] == pytest.approx(size, rel=1e-5)


def test_evaluating_changes_nothing_about_training(new_run):
    plain = new_run({}, run_id="plain").train()
    evaluated = new_run({"loss": partial(Loss, dataset_key="test", every_n_updates=3)}, run_id="evaluated").train()
    assert torch.equal(plain.model.module.layer.weight, evaluated.model.module.layer.weight)
