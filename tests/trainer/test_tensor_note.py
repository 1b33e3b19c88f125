"""An error in a step says which tensors it was computed with."""

import warnings

import pytest
from torch import nn

from callbacks.loss import Loss
from ksuit_runner import DatasetCallback, SgdTrainer
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError

BROADCASTS = "different to the input size"


class Own(SgdTrainer):
    def training_step(self, batch, model):
        scores = {"classes": model(batch[0])}
        return self.loss(scores["classes"], batch[1].float()), scores


class Bad(DatasetCallback):
    def _process_batch(self, batch, models):
        inputs, targets = batch
        for model in models.values():
            outputs = self.trainer.predict(inputs, model)
            (outputs - targets).sum()

    def _process_results(self, update_counter):
        """Nothing."""


def note(run, error):
    with pytest.raises(error) as raised:
        train(run)
    (found,) = [item for item in raised.value.__notes__ if item.startswith("tensors in ")]
    return found


def test_a_model_and_a_loss_that_do_not_fit(maker):
    with pytest.raises(ConfigError) as of_model:
        train(maker.run(model=nn.Linear(5, 3)))
    assert str(of_model.value) == (
        "model: its layers do not fit each other, or the data: "
        "mat1 and mat2 shapes cannot be multiplied (6x4 and 5x3)\n"
        "tensors in training_step: inputs: float32 (6, 4), targets: int64 (6,)"
    )
    for number, callbacks in enumerate([{}, {"loss": (Loss, {"dataset_key": "test", "every_n_epochs": 1})}]):
        with pytest.raises(ConfigError) as of_loss:
            train(maker.run(callbacks, loss=nn.BCEWithLogitsLoss(), run_id=f"run1000{number}"))
        assert str(of_loss.value).startswith(
            "loss: BCEWithLogitsLoss does not fit the model's outputs and the targets: "
        )
        assert str(of_loss.value).endswith(", targets: int64 (6,), outputs: float32 (6, 3)")


class Warns(nn.Linear):
    """A model whose code warns, as often as it is called."""

    def forward(self, x):
        warnings.warn("the inputs are not scaled", stacklevel=1)
        return super().forward(x)


def test_what_torch_warns_of_before_it_refuses_is_left_out_and_nothing_else(maker):
    with pytest.warns() as shown, pytest.raises(ConfigError, match="^loss: MSELoss does not fit"):
        train(maker.run(model=Warns(4, 3), loss=nn.MSELoss()))
    assert {str(item.message) for item in shown} == {"the inputs are not scaled"}, "that is the user's own"
    with pytest.warns(UserWarning, match=BROADCASTS), pytest.raises(RuntimeError, match="must match the size"):
        train(maker.run(trainer_class=Own, loss=nn.MSELoss(), run_id="run00001"))  # a traceback, as it comes


class Scores(SgdTrainer):
    def training_step(self, batch, model):
        outputs = model(batch[0])
        return self.loss(outputs, batch[1].float()[:1]), outputs


@pytest.mark.filterwarnings("default")
def test_a_run_that_goes_on_shows_what_torch_warns_of_once(maker, recwarn):
    show = warnings.showwarning
    train(maker.run(trainer_class=Scores, loss=nn.MSELoss(), accumulation_steps=2))
    assert [BROADCASTS in str(item.message) for item in recwarn] == [True]
    assert warnings.showwarning is show


class Grows(nn.Linear):
    """Code of a user's, which fails in one of its calls."""

    def __init__(self, fails_in):
        super().__init__(4, 3)
        self.fails_in, self.calls = fails_in, 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x if self.calls < self.fails_in else x[:, 1:])


@pytest.mark.parametrize("fails_in", [1, 5])
def test_code_of_ones_own_keeps_its_traceback(maker, fails_in):
    run = maker.run(model=Grows(fails_in))
    assert note(run, RuntimeError) == "tensors in training_step: inputs: float32 (6, 4), targets: int64 (6,)"


def test_a_step_and_a_callback_of_ones_own(maker):
    run = maker.run(trainer_class=Own, accumulation_steps=2)
    assert note(run, RuntimeError) == (
        "tensors in training_step: batch: (float32 (3, 4), int64 (3,)), scores: (classes: float32 (3, 3))"
    )
    run = maker.run({"bad": (Bad, {"dataset_key": "test", "every_n_updates": 2})}, run_id="run00001")
    assert note(run, RuntimeError) == (
        "tensors in _process_batch: inputs: float32 (6, 4), targets: int64 (6,), outputs: float32 (6, 3)"
    )
