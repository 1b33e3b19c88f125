"""A mean over batches, or over the parts of one, is the mean over everything in them."""

import logging

import pytest
import torch
from by_hand import SGD, cut_by_rows, gradients
from torch import nn

from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.errors import LossError
from ksuit_runner.trainer.loss_weights import LossWeights
from ksuit_runner.trainer.sgd import SgdTrainer

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


class Masked(nn.Module):
    """A loss of one's own, which is a mean over what is not masked."""

    def forward(self, outputs, targets):
        each = nn.functional.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
        return (each * (targets >= 0)).sum() / self.count(targets)

    def count(self, targets):
        return (targets >= 0).sum()


class LogLikelihood(nn.NLLLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs.log_softmax(1), targets)

    def count(self, targets):
        return (targets != self.ignore_index).sum()


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "ignores": nn.CrossEntropyLoss(ignore_index=-1),
    "weighs": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=-1, label_smoothing=0.1),
    "sum": nn.CrossEntropyLoss(ignore_index=-1, reduction="sum"),
    "own": Masked(),
    "likelihood": LogLikelihood(ignore_index=-1),
}


def batch(ignored=-1):
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, ignored, ignored, ignored, 1, 2, ignored, 1, 2])
    return torch.randn(9, 4, generator=generator), targets


@pytest.mark.parametrize("steps", [2, 3, 9])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_parts_is_that_of_the_whole_batch(maker, name, steps):
    whole, parts = (
        gradients(
            maker.trainer(dropout=0.0, loss=LOSSES[name], accumulation_steps=n), batch(0 if name == "plain" else -1)
        )
        for n in (1, steps)
    )
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, msg=key)


def test_one_target_per_token_counts(maker):
    trainer = maker.trainer(accumulation_steps=2)
    targets = torch.tensor([[1, 2, 0], [1, -100, -100], [-100, -100, -100]])
    parts = [Part((torch.ones(1, 3, 4), targets[row : row + 1]), row, 1) for row in range(2)]
    assert [part.weight for part in trainer.start_update(parts)] == [3, 1]
    parts[1] = Part((torch.ones(1, 3, 4), targets[2:]), 1, 1)
    assert [part.number for part in trainer.start_update(parts)] == [0], "one without any target is left out"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("policy", ["fail", "skip", "warn"])
def test_a_batch_without_any_target_is_what_nan_loss_decides(maker, steps, policy):
    """The mean over nothing is NaN."""
    trainer = maker.trainer(accumulation_steps=steps, nan_loss=policy)
    batch = torch.ones(4, 4), torch.full((4,), -100)
    if policy == "fail":
        with pytest.raises(LossError, match="the loss of update 1 is nan"):
            gradients(trainer, batch)
    else:
        parts = trainer.start_update(cut_by_rows(batch, steps))
        losses = [(trainer.update.forward(part)[0], part) for part in parts]
        assert [trainer.update.leaves_out(*pair) for pair in losses] == [policy == "skip"] * len(parts)
        assert trainer.update.complete_gradients(UpdateWord()) is (policy == "warn")


class Wrapper(nn.Module):
    """Hides what it does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, outputs, targets):
        return self.inner(outputs, targets)


@pytest.mark.parametrize(
    ("inner", "ignored", "warns"),
    [
        (nn.CrossEntropyLoss(), 0, False),
        (nn.CrossEntropyLoss(), -100, True),
        (nn.CrossEntropyLoss(ignore_index=-1), -1, True),
        (nn.CrossEntropyLoss(weight=WEIGHTS), 0, True),
        (nn.MSELoss(), -100, False),
    ],
)
def test_an_uneven_loss_that_cannot_be_counted_is_warned_about_once(caplog, inner, ignored, warns):
    caplog.set_level(logging.WARNING)
    weights = LossWeights(Wrapper(inner))
    assert [weights.of(batch(ignored)[1], 9) for _ in range(2)] == [9, 9]
    assert caplog.text.count("count(targets)") == int(warns)


def test_a_custom_step_with_a_loss_that_sums_up_is_warned_about(maker, caplog):
    class Own(SgdTrainer):
        def training_step(self, batch, model):
            losses, outputs = super().training_step(batch, model)
            return {"total": losses["total"] / len(batch[0])}, outputs

    base = maker.trainer()
    trainer = Own(base.model, base.data_container, SGD, lambda *_: base.schedule, LOSSES["sum"], max_updates=1)
    trainer.forward(batch())
    assert "what Own.training_step returns counts as a mean" in caplog.text
    assert not trainer.sums_up
