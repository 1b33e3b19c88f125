"""A loss says what it is a mean over, and then it does not matter how a batch is cut."""

from functools import partial

import pytest
import torch
from by_hand import gradients
from torch.nn.functional import cross_entropy

from callbacks.loss import Loss
from callbacks.train_loss import TrainLoss
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import KsuitError, LossError
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer.sgd import SgdTrainer

TARGETS = torch.tensor([0, -1, -1, -1, 1, 2, -1, 1, 2])
BATCH = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), TARGETS


class Counted(SgdTrainer):
    """Names a mean over the samples that have a class, one over those that have another, and one over all."""

    as_number = False

    def training_step(self, batch, model):
        inputs, targets = batch
        outputs = model(inputs)
        classes, positive = (
            self.mean(cross_entropy(outputs, targets.clamp(min=0), reduction="none"), targets >= 0),
            (self.mean(outputs[:, 0].square(), targets == 1)),
        )
        return self.named(classes, positive, outputs.square().mean()), outputs

    def mean(self, each, mask):
        count = mask.sum()
        return (each * mask).sum() / count, int(count) if self.as_number else count

    def named(self, classes, positive, size):
        return {"classes": classes, "positive": positive, "size": size}


class Total(Counted):
    def named(self, classes, positive, size):
        return {"total": classes, "size": size}


class Alone(Counted):
    as_number = True

    def named(self, classes, positive, size):
        return classes


KINDS = {
    "total": (Total, {}),
    "alone": (Alone, {}),
    "one": (Counted, {"loss_weights": {"classes": 0.5}}),
    "two": (Counted, {"loss_weights": {"classes": 0.5, "positive": 2.0}}),
    "mixed": (Counted, {"loss_weights": {"size": 0.3, "classes": 0.5, "positive": 2.0}}),
}


@pytest.mark.parametrize("steps", [2, 3, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_counted_losses_is_that_of_the_whole_batch(maker, kind, steps):
    trainer, options = KINDS[kind]
    whole, parts = (
        gradients(maker.trainer(trainer_class=trainer, dropout=0.0, accumulation_steps=n, **options), BATCH)
        for n in (1, steps)
    )
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(parts[name], gradient, msg=name)


def test_equal_counts_give_the_bits_of_equal_shares(maker, bits):
    batch = BATCH[0][:8], torch.arange(8) % 3
    counted, plain = (
        gradients(maker.trainer(trainer_class=kind, dropout=0.0, accumulation_steps=4), batch)
        for kind in (Total, SgdTrainer)
    )
    assert bits(counted) == bits(plain)


class Ragged:
    """Points of which the first ones of every ten have no class."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(64, generator=generator), torch.tensor(-1 if index % 10 < 6 else index % 3)


@pytest.mark.parametrize("kind", KINDS)
def test_logged_means_do_not_depend_on_how_a_dataset_is_cut(tmp_path, kind):
    trainer, options = KINDS[kind]
    callbacks = {
        "train": partial(TrainLoss, every_n_updates=2),
        "test": partial(Loss, dataset_key="test", every_n_updates=2),
    }
    found = []
    for size, steps in ((20, 1), (5, 4)):
        run = tiny_run(
            tmp_path,
            callbacks,
            run_id=f"{kind}{size}",
            datasets={"train": Ragged(), "test": Ragged()},
            module=torch.nn.Linear(64, 3),
            optimizer=partial(torch.optim.SGD, lr=0.0),
            trainer_class=trainer,
            batch_size=20,
            max_updates=2,
            accumulation_steps=steps,
            **options,
        )
        run.run.trainer.model.module.load_state_dict({"weight": torch.ones(3, 64) / 9, "bias": torch.arange(3.0)})
        run.run.data.eval_batch_size = size
        run.train()
        found.append({key: run.metric(key)[2] for key in sorted(run.metrics())})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == {"total": 4, "alone": 2}.get(kind, 8)
    assert found[0]["loss/train"] == pytest.approx(found[0]["loss/test"], rel=1e-5)


def test_sums_since_the_last_log_survive_a_resume(tmp_path):
    callbacks = {"loss": partial(TrainLoss, every_n_updates=3)}
    options = {"trainer_class": Counted, "loss_weights": {"classes": 1.0, "positive": 1.0}, "max_updates": 7}
    whole = tiny_run(tmp_path, callbacks, run_id="whole", **options).train()
    tiny_run(tmp_path, callbacks, run_id="cut", stop_at=4, **options).train()
    resumed = tiny_run(tmp_path, callbacks, run_id="cut", **options).train()
    assert whole.metrics() == {"loss/train", "loss_classes/train", "loss_positive/train", "loss_size/train"}
    for key in whole.metrics():
        assert whole.metric(key) == resumed.metric(key)
        assert list(whole.metric(key)) == [3, 6]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_mean_over_nothing_in_the_whole_batch_is_what_nan_loss_decides(maker, steps):
    class Nothing(Total):
        def training_step(self, batch, model):
            return super().training_step((batch[0], batch[1] * 0 - 1), model)

    with pytest.raises(LossError, match="the loss of update 1 is nan"):
        train(maker.run(trainer_class=Nothing, accumulation_steps=steps))


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        (Counted, None, r"no 'total', .*: sum up its losses.*loss_weights={classes: 1, positive: 1, size: 1}"),
        (Counted, {"clases": 1.0}, "loss_weights: Counted.training_step returns no 'clases'. Did you mean 'classes'"),
        (Total, {"size": 1.0}, "loss_weights: Total.training_step returns a 'total' of its own"),
    ],
)
def test_weights_that_do_not_fit_the_losses_are_explained(maker, kind, weights, message):
    with pytest.raises(KsuitError, match=message):
        maker.trainer(trainer_class=kind, loss_weights=weights).forward(BATCH)


@pytest.mark.parametrize("weights", [None, {"a": 1.0}])
def test_a_loss_that_is_missing_later_is_named_too(maker, weights):
    class Late(SgdTrainer):
        def training_step(self, batch, model):
            loss = model(batch[0]).mean()
            return {("a" if weights else "total") if self.counter.update < 2 else "b": loss}, None

    with pytest.raises(KsuitError, match="Late.training_step returns no '(a|total)'"):
        train(maker.run(trainer_class=Late, loss_weights=weights))


@pytest.mark.parametrize("steps", [1, 3])
def test_losses_and_counts_of_one_element_are_scalars(maker, bits, steps):
    def trained(reshape):
        class Shapes(SgdTrainer):
            def training_step(self, batch, model):
                outputs = model(batch[0])
                losses = {"a": outputs.mean().reshape(reshape), "b": (outputs.std(), torch.full(reshape, 2))}
                return losses, outputs

        run = maker.run(trainer_class=Shapes, loss_weights={"a": 1, "b": 2}, accumulation_steps=steps)
        train(run)
        return bits(run.trainer.model.tensors())

    assert trained((1,)) == trained(())
