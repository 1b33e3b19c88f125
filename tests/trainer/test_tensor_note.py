"""An error in a step says which tensors it was computed with."""

import pytest
from torch import nn

from ksuit_runner import DatasetCallback, SgdTrainer
from ksuit_runner.engine.loop import train


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
    run = maker.run(model=nn.Linear(5, 3))
    assert note(run, RuntimeError) == "tensors in training_step: inputs: float32 (6, 4), targets: int64 (6,)"
    run = maker.run(loss=nn.BCEWithLogitsLoss(), run_id="run00001")
    assert note(run, ValueError) == (
        "tensors in training_step: inputs: float32 (6, 4), targets: int64 (6,), outputs: float32 (6, 3)"
    )


def test_a_step_and_a_callback_of_ones_own(maker):
    run = maker.run(trainer_class=Own, accumulation_steps=2)
    assert note(run, RuntimeError) == (
        "tensors in training_step: batch: (float32 (3, 4), int64 (3,)), scores: (classes: float32 (3, 3))"
    )
    run = maker.run({"bad": (Bad, {"dataset_key": "test", "every_n_updates": 2})}, run_id="run00001")
    assert note(run, RuntimeError) == (
        "tensors in _process_batch: inputs: float32 (6, 4), targets: int64 (6,), outputs: float32 (6, 3)"
    )
