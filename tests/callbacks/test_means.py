"""That a logged loss is the mean over everything that counts, however it is cut into batches and parts."""

from functools import partial

import pytest
import torch
from torch import nn

from callbacks.loss import Loss
from callbacks.train_loss import TrainLoss
from ksuit_runner.trainer.sgd import SgdTrainer

LOSSES = {
    "ignores": nn.CrossEntropyLoss(ignore_index=-1),
    "weighs": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=-1),
    "sum": nn.CrossEntropyLoss(ignore_index=-1, reduction="sum"),
}


class Ragged:
    """Points of which most of the first ones have no class."""

    input_shape, output_shape = (4,), (3,)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator), torch.tensor(-1 if index % 10 < 6 else index % 3)


def logged(new_run, run_id, callbacks, **options):
    data = {"train": Ragged(), "test": Ragged()}
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    run = new_run(
        callbacks, run_id=run_id, datasets=data, module=model, optimizer=partial(torch.optim.SGD, lr=0.0), **options
    )
    run.run.data.eval_batch_size = options.get("batch_size", 20)
    run.train()
    return run


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_dataset_does_not_depend_on_how_it_is_cut(new_run, name):
    """Six samples in a row have no target: a batch of five of them has a mean over nothing."""
    loss, values = {"loss": partial(Loss, dataset_key="test", every_n_updates=1)}, []
    for size in (20, 5):
        run = logged(
            new_run,
            f"{name}{size}",
            loss,
            loss=LOSSES[name],
            batch_size=size,
            max_updates=1,
            nan_loss="skip",
            max_skips=2,
        )
        values.append(run.metric("loss/test")[1])
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_that_is_trained_on_does_not_depend_on_how_it_is_cut(new_run, name):
    loss, values = {"loss": partial(TrainLoss, every_n_updates=2)}, []
    for steps in (1, 3):
        options = {"batch_size": 10, "max_updates": 2, "accumulation_steps": steps}
        run = logged(new_run, f"{name}{steps}", loss, loss=LOSSES[name], **options)
        values.append(run.metric("loss/train")[2])
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] > 0


class Sized(SgdTrainer):
    """Has another loss, a mean over samples."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        return {**losses, "size": outputs.square().mean()}, outputs


def test_other_losses_are_means_over_samples(new_run):
    loss, values = {"loss": partial(Loss, dataset_key="test", every_n_updates=1)}, []
    for size in (20, 5):
        options = {"batch_size": size, "max_updates": 1, "trainer_class": Sized}
        run = logged(new_run, f"sized{size}", loss, loss=LOSSES["ignores"], **options)
        values.append((run.metric("loss/test")[1], run.metric("loss_size/test")[1]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
